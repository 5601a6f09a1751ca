"""Arguments in, exit code out; results on stdout, progress on stderr, and nothing heavy before it is needed."""

import contextlib
import json
import math
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

import qsvd
from qsvd.cli import parse, run
from qsvd.options import Quantize, Report
from tests.checkpoints import write_checkpoint
from tests.commands.folders import ALWAYS, python_path, without_progress
from tests.stops import FORK

HEAVY = ("torch", "transformers", "bitsandbytes", "peft", "numpy", "safetensors")
LINE = re.compile(r"\d+/14 weights, ([\d.]+ MB/s, (\d+ s left|resumed), )?error [+-]\d+\.\d % by components")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder)
    return folder


@pytest.mark.parametrize("arguments", [["--help"], ["quantize", "--help"], ["--version"], ["quantize"]])
def test_nothing_heavy_is_imported_by_help_version_or_a_wrong_flag(arguments):
    lines = ["import sys", "sys.argv = ['qsvd']", "from qsvd.cli import main"]
    lines += ["try:", f"    main({arguments!r})", "except SystemExit:", "    pass"]
    lines += [f"print('heavy:', [name for name in {HEAVY} if name in sys.modules])"]
    environment = os.environ | {"PYTHONPATH": python_path()}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_names_of_the_library_are_found_and_others_are_not():
    import qsvd

    assert all(getattr(qsvd, name) is not None for name in qsvd.__all__)
    with pytest.raises(AttributeError, match="module 'qsvd' has no attribute 'dequantize'"):
        qsvd.dequantize  # noqa: B018


def test_version_is_the_one_of_the_project(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"qsvd {qsvd.__version__}\n"


@pytest.mark.parametrize("arguments", ["", "quantise m"])
def test_another_command_ends_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        run(arguments.split())
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err


def test_flags_become_a_record():
    words = "quantize some/model --out there --rank 8 --no-double-quant --include *.q *.k --order quantize --dry-run"
    assert parse(words.split()) == Quantize(
        "some/model",
        out=Path("there"),
        rank=8,
        double_quant=False,
        include=("*.q", "*.k"),
        order="quantize",
        dry_run=True,
    )
    assert parse(["report", "there", "--json"]) == Report((Path("there"),), json=True)


def test_a_dry_run_prints_options_weights_and_sizes_and_writes_nothing(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    out = tmp_path / "out"
    assert run(["quantize", str(model), "--out", str(out), "--rank", "7", "--device", "cpu", "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert not any(tmp_path.iterdir())
    words = " ".join(shown.out.replace("│", " ").split())
    for option in ("--rank 7", "--iterations 5", "--order svd", "--shard-size 5GB", "(device) cpu", "--dry-run True"):
        assert option in words
    assert "model.layers.0-1.self_attn.q_proj 2 q 64 x 64 nf4+dq 7" in words
    assert "model.layers.0-1.mlp.down_proj 2 down 64 x 128 nf4+dq 7" in words
    assert "Coverage: 14 layers quantized, 73,728 of 86,336 elements (85.40 %)" in words
    assert "Left: model.embed_tokens.weight (1 tensor, 6,144 elements)" in words
    sizes = dict(re.findall(r"(in the 16-bit model|residual|components|copied) ([\d.]+)", words))
    assert {name: float(size) for name, size in sizes.items()}.keys() >= {
        "in the 16-bit model",
        "residual",
        "components",
        "copied",
    }
    assert float(sizes["in the 16-bit model"]) == pytest.approx(73728 * 2 / 1e6, abs=0.05)
    assert "Files: model.safetensors" in words


def test_the_report_is_on_stdout_and_the_progress_on_stderr(model, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(["quantize", str(model), "--out", str(out), "--rank", "4"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(f"Quantization error of {model}".split("/")[0])
    assert shown.out.splitlines()[-1] == str(out)
    assert "by layer type" in shown.out
    lines = [line for line in shown.err.splitlines() if not line.startswith(ALWAYS)]
    assert len(lines) > 3
    assert all(LINE.fullmatch(line) for line in lines)
    assert lines[-1].startswith("14/14 weights, ")
    assert re.search(r"^Time: .*\d s splitting and measuring", shown.err, re.MULTILINE)


def test_the_last_line_of_progress_states_the_reduction_of_the_whole_model(model, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(["quantize", str(model), "--out", str(out), "--rank", "4"]) == 0
    stated = float(re.findall(r"error ([+-]\d+\.\d) % by components\n", capsys.readouterr().err)[-1])
    records = [json.loads(line) for line in (out / "errors.jsonl").read_text().splitlines()]
    before, after = (math.hypot(*(record[side]["frobenius"] for record in records)) for side in ("before", "after"))
    assert stated == pytest.approx(-100 * (1 - after / before), abs=0.05)


def test_a_result_that_is_complete_is_shown_again_without_work(model, tmp_path, capsys):
    arguments = ["quantize", str(model), "--out", str(tmp_path / "out"), "--rank", "4"]
    assert run(arguments) == 0
    first = capsys.readouterr()
    assert run(arguments) == 0
    again = capsys.readouterr()
    assert without_progress(again.err) == f"{tmp_path / 'out'} was complete already\n"
    assert again.out == first.out


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # Python 3.12; the child has one
def test_a_terminal_gets_a_bar(model, tmp_path):
    master, terminal = pty.openpty()
    arguments = ["quantize", str(model), "--out", "out", "--rank", "4", "--iterations", "1"]

    def work():
        os.chdir(tmp_path)
        with open("stdout", "w") as sys.stdout, open(terminal, "w") as sys.stderr:
            code = run(arguments)
        os._exit(code)

    process = FORK.Process(target=work)
    process.start()
    os.close(terminal)
    seen = "".join(until_closed(master))
    process.join(timeout=600)
    assert process.exitcode == 0
    out = (tmp_path / "stdout").read_text()
    assert "14/14 weights" in seen
    assert "━" in seen
    assert "\x1b[" in seen
    assert "━" not in out
    assert out.endswith("\nout\n")


def until_closed(master):
    """What a terminal is sent until the last process has closed it."""
    with contextlib.suppress(OSError), open(master, "rb", buffering=0) as terminal:  # Linux ends with an EIO
        while sent := terminal.read(4096):
            yield sent.decode(errors="replace")


def test_report_prints_the_same_tables_again_and_json_that_parses(model, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(["quantize", str(model), "--out", str(out), "--rank", "4"]) == 0
    capsys.readouterr()
    assert run(["report", str(out)]) == 0
    assert "by layer type" in capsys.readouterr().out
    assert run(["report", str(out), "--json"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert len(json.loads(shown.out)["weights"]) == 14


def test_a_path_that_is_not_utf_8_is_refused_and_every_sentence_is_one_line(tmp_path, capsys):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/m\xff")
    assert run(["quantize", str(tmp_path), "--out", path]) == 2
    assert run(["quantize", "a\x1b[2J\nqsvd: done", "--out", str(tmp_path / "out")]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("qsvd: not a text in UTF-8: out ")
    assert second.startswith(r"qsvd: no folder 'a\x1b[2J\nqsvd: done' here")
