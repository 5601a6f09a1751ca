"""What is answered without work imports nothing heavy."""

import importlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys

import pytest
import torch

import qsvd
from qsvd.cli import run
from tests.checkpoints import write_checkpoint
from tests.commands.folders import python_path

HEAVY = ("torch", "transformers", "bitsandbytes", "datasets", "scipy", "numpy", "safetensors", "peft")
FORK = multiprocessing.get_context("fork")
QUANTIZERS = ("transformers.quantizers", "transformers.integrations")  # whose import brings our own method
PROGRAM = """
import contextlib, io, json, sys
from qsvd.cli import main
for words in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            main(words)
        except SystemExit as ended:
            code = ended.code
    print(json.dumps([code, said.getvalue(), [name for name in sys.argv[2].split() if name in sys.modules]]))
"""


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized")
    write_checkpoint(folder / "source")
    return qsvd.quantize(qsvd.Quantize(str(folder / "source"), out=folder / "out", rank=2, iterations=1))


def answers(commands, folder, heavy=HEAVY):
    """Exit code, text and heavy imports of each command, all in one new process."""
    environment = os.environ | {"PYTHONPATH": python_path()}
    words = [sys.executable, "-c", PROGRAM, json.dumps(commands), " ".join(heavy)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment, cwd=folder)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_help_mistakes_and_the_report_import_nothing_heavy(out, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "data.jsonl").write_text('{"text": "x"}\n')
    model = str(shutil.copytree(out.parent / "source", tmp_path / "model"))
    base = str(out)
    expected = [
        (["--help"], 0, "commands:"),
        (["train", "--help"], 0, "--learning-rate"),
        (["--version"], 0, "qsvd "),
        (["quantise"], 2, "there is no command 'quantise'"),
        (["quantize"], 2, "--out"),
        (["quantize", "./nowhere", "--out", "x"], 2, "no folder './nowhere' here"),
        (["quantize", "empty", "--out", "x"], 2, "no config.json in empty"),
        (["quantize", model, "--out", "file"], 2, "--out file is not a folder"),
        (["quantize", model, "--out", "x", "--shard-size", "5KB"], 2, "--shard-size '5KB'"),
        (["quantize", model, "--out", "x", "--device", "gpu"], 2, "--device 'gpu' is not one of"),
        (["quantize", model, "--out", "x", "--config", "none.yaml"], 2, "none.yaml: no such file"),
        (["calibrate", model, "./no.jsonl", "--out", "x"], 2, "no such file or folder: ./no.jsonl"),
        (["allocate", model, "--budget", "3bits", "--out", "empty"], 2, "--out empty is a folder"),
        (["plan", "./nowhere"], 2, "no folder './nowhere' here"),
        (["plan", model, "--max-length", "0"], 2, "--max-length 0 is below 2"),
        (["train", "empty", "data.jsonl", "--out", "x"], 2, "empty is not a 16-bit model (config.json), a quantized"),
        (["train", base, "no.jsonl", "--out", "x"], 2, "no such file or folder: no.jsonl"),
        (["train", base, "data.jsonl", "--out", "x", "--gpu", "24X"], 2, "--gpu '24X'"),
        (["train", base, "data.jsonl", "--out", "x", "--target-modules", "k_prjo"], 2, "(nearest: k_proj"),
        (["train", base, "data.jsonl", "--out", "x", "--dropout", "0.1", "--method", "pissa"], 2, "--dropout is for"),
        (["train", base, "data.jsonl", "--out", "x", "--chat-template", "chatlm"], 2, "(did you mean chatml?)"),
        (["train", base, "data.jsonl", "--out", "x", "--lora-dropout", "1"], 2, "--dropout 1.0 is not a number from 0"),
        (["eval", "empty", "--data", "data.jsonl"], 2, "empty is not a 16-bit model"),
        (["generate", "./nowhere", "--prompt", "x"], 2, "no folder './nowhere' here"),
        (["generate", base, "--prompt", "x", "--max-new-tokens", "0"], 2, "--max-new-tokens 0 is below 1"),
        (["export", "nowhere", "--out", "x", "--to", "peft"], 2, "no folder nowhere here"),
        (["report", base], 0, "Quantization error of"),
        (["report", base, "--json"], 0, '"weights"'),
        (["report", "empty"], 2, "empty is not a quantized model"),
    ]
    found = answers([words for words, _, _ in expected], tmp_path)
    for (words, code, text), (found_code, said, heavy) in zip(expected, found, strict=True):
        assert (words, found_code, heavy) == (words, code, [])
        assert text in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "empty", "file", "model"]


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # Python 3.12; the child has one
def test_a_plan_imports_neither_bitsandbytes_nor_datasets(out):
    """In a fork that has torch, but imports qsvd and all that loads these two anew."""
    neither = ("bitsandbytes", "datasets")

    def plan():
        for name in list(sys.modules):
            if name.partition(".")[0] in ("qsvd", *neither) or name.startswith(QUANTIZERS):
                del sys.modules[name]
        torch.set_num_threads(1)
        anew = importlib.import_module("qsvd.cli").run
        code = anew(["plan", str(out.parent / "source"), "--rank", "2", "--max-length", "16"])
        os._exit(code or len([name for name in neither if name in sys.modules]))

    process = FORK.Process(target=plan)
    process.start()
    process.join(timeout=600)
    assert process.exitcode == 0


@pytest.mark.parametrize("missing", ["qsvd.json", "errors.jsonl"])
def test_a_report_without_its_files_is_refused(out, tmp_path, missing, capsys):
    copy = shutil.copytree(out, tmp_path / "out")
    (copy / missing).unlink()
    assert run(["report", str(copy)]) in (1, 2)
    assert missing in capsys.readouterr().err
