"""`qsvd train` on a 16-bit model: one command for qsvd quantize and qsvd train, which goes on after a kill."""

import json
import re
import shutil
import signal
from dataclasses import replace

import pytest

import qsvd
import qsvd.prepare.quantize
from qsvd.cli import run
from qsvd.decompose.alternate import split_weights
from tests.commands.folders import files_of
from tests.commands.measurements import few_candidates
from tests.gradients import write_gradients
from tests.runs import interrupting, labelled_rows, outcome, text_rows, training, words, write_rows

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source(tiny):
    return tiny.parent / "source"


def options_in(folder, source):
    short = {"save_every": 1, "steps": 3, "accumulate": 1, "any_start": True}
    return training(source, write_rows(folder / "texts.jsonl", text_rows()), folder / "RUN", **short)


@pytest.fixture
def options(source, tmp_path):
    return options_in(tmp_path, source)


@pytest.fixture(scope="module")
def alone(source, tmp_path_factory):
    """A folder in which nothing has stopped the command with those options: the quantized model and RUN."""
    folder = tmp_path_factory.mktemp("alone")
    assert run(words(options_in(folder, source))) == 0
    return folder


def test_gradients_are_checked_before_the_model_is_quantized(source, options, tmp_path, capsys):
    for place, fingerprint in (("ours", None), ("others", "0" * 16)):
        write_gradients(source.parent / "out", tmp_path / place, 4, fingerprint=fingerprint)
    asked = training(source, options.data, options.out, method="lora-ga", rank=4, steps=1, any_start=True)
    refused = {
        None: "lora-ga starts from gradients of the 16-bit model: give --gradients FILE",
        tmp_path / "others": "others has the gradients of another model",
    }
    for file, said in refused.items():
        capsys.readouterr()
        assert run(words(replace(asked, gradients=file))) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "source-nf4-r0").exists()
    assert run(words(replace(asked, gradients=tmp_path / "ours"))) == 0
    assert (tmp_path / "source-nf4-r0" / "qsvd.json").is_file()


WAYS = {  # options of train -> of quantize, of train on its output, the folder
    "rank": ({"rank": 5, "double_quant": False}, ["--rank", "5", "--no-double-quant"], [], "source-nf4-plain-r5"),
    "lora": ({"method": "lora", "rank": 6}, ["--rank", "0"], ["--method", "lora", "--rank", "6"], "source-nf4-r0"),
    "budget": (
        {"budget": "5bits", "rank": 4},
        ["--rank", "4", "--budget", "5bits", "--allocator", "bits"],
        [],
        "source-5bits-r4",
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_one_command_writes_the_bytes_of_two(options, tmp_path, way, monkeypatch):
    chosen, quantize, train, name = WAYS[way]
    few_candidates(monkeypatch, 0)  # for both commands
    options = replace(options, steps=1)
    assert run(words(replace(options, **chosen))) == 0
    two = tmp_path / "two" / name
    assert run(["quantize", options.base, "--out", str(two), "--device", "cpu", *quantize]) == 0
    again = replace(options, base=str(two), out=tmp_path / "two" / "RUN")
    assert run([*words(again), *train]) == 0
    assert outcome(options.out) == outcome(again.out)
    identities = [json.loads((folder / "run.json").read_text()) for folder in (options.out, again.out)]
    named = {"command", "qsvd_digest"}  # they name the folder
    assert (
        len({json.dumps({k: v for k, v in one.items() if k not in named}, sort_keys=True) for one in identities}) == 1
    )
    shown = {"README.md", "qsvd.json", "report.html"}  # as these
    found, expected = (
        {file: text for file, text in files_of(folder).items() if file not in shown}
        for folder in (tmp_path / name, two)
    )
    assert found == expected


def test_another_run_uses_the_quantized_model_again_and_the_same_command_changes_nothing(source, alone):
    options = options_in(alone, source)
    before = {folder: files_of(alone / folder) for folder in ("RUN", "source-nf4-r64")}
    assert run(words(options)) == 0
    assert run(words(replace(options, out=alone / "RUN2", seed=1, steps=1))) == 0
    assert {folder: files_of(alone / folder) for folder in before} == before
    assert {path.name for path in alone.iterdir()} == {*before, "RUN2", "texts.jsonl"}
    shutil.rmtree(alone / "RUN2")


def test_an_interrupt_in_each_part_is_continued_by_the_same_command(options, alone, tmp_path, monkeypatch, capsys):
    begun = []

    def interrupted_split(*arguments, **given):
        begun.append(arguments)
        if len(begun) == 3:
            signal.raise_signal(signal.SIGINT)
        return split_weights(*arguments, **given)

    with monkeypatch.context() as patch:
        patch.setattr(qsvd.prepare.quantize, "split_weights", interrupted_split)
        assert run(words(options)) == 130
    shown = capsys.readouterr().err
    assert shown.splitlines()[0].startswith("Training: causal language model on texts")
    assert f"First: {options.base} is quantized into {tmp_path / 'source-nf4-r64'}\n" in shown
    assert f"the same command continues in {tmp_path / 'source-nf4-r64'}" in shown
    assert not options.out.exists()
    with monkeypatch.context() as patch:
        interrupting(patch, 2)
        assert run(words(options)) == 130
    assert f"the same command continues in {options.out}" in capsys.readouterr().err
    assert run(words(options)) == 0
    assert outcome(options.out) == outcome(alone / "RUN")


def refused(options, capsys, code=2):
    capsys.readouterr()
    assert run(words(options)) == code
    return capsys.readouterr().err.splitlines()[-1]


def test_what_cannot_be_done_is_refused_before_anything_is_quantized(options, tmp_path, capsys):
    labelled = write_rows(tmp_path / "labelled.jsonl", labelled_rows())
    rows = write_rows(tmp_path / "rows.jsonl", [{"what": "x"}])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").touch()
    table = tmp_path / "table.txt"
    table.write_text("nothing\n")
    for changes, sentence in {
        "data": ({"data": rows}, "rows.jsonl"),
        "task": ({"data": labelled}, "give --task classification"),
        "length": ({"max_length": 129}, "--max-length 129 is above 128"),
        "rank": ({"rank": 999}, "--rank 999 is above 64, the shorter side of the smallest layer"),
        "lora only": (
            {"rslora": True},
            "rslora is an option of the method lora or dora or lora-fa or lora-ga or ",
        ),
        "start": ({"init_from": tmp_path}, "--init-from"),
        "memory": ({"host": "1MB"}, "needs"),
        "budget": ({"budget": "1bits"}, "--budget 1bits"),
        "both": ({"budget": "4bits", "allocation": table}, "--budget and --allocation both set"),
        "table": ({"allocation": table}, "table.txt"),
        "quantized": ({"quantized": tmp_path / "other"}, "give --quantized another folder"),
        "run": ({"out": tmp_path / "other"}, "is not empty and was not written by qsvd train"),
        "layers": ({"target_modules": ("no_such_proj",)}, "no_such_proj"),
        "eval": ({"eval_every": 2}, "--eval-every needs held-out examples"),
    }.values():
        assert sentence in refused(replace(options, **changes), capsys, 3 if "host" in changes else 2)
    assert {path.name for path in tmp_path.iterdir()} == {
        "texts.jsonl",
        "labelled.jsonl",
        "rows.jsonl",
        "other",
        "table.txt",
    }


def test_a_folder_that_holds_something_else_is_named_with_its_option(options, alone, tmp_path, capsys):
    shutil.copytree(alone, tmp_path, dirs_exist_ok=True)
    other = refused(replace(options, rank=4, quantized=tmp_path / "source-nf4-r64"), capsys)
    assert re.search(
        r"source-nf4-r64 was written with other options: rank 64 there, 4 now; .* give --quantized ", other
    )
    assert "holds a run on" in refused(replace(options, rank=4), capsys)
    assert not (tmp_path / "source-nf4-r4").exists()
    out = str(tmp_path / "source-nf4-r64")
    for changes in ({"budget": "4bits"}, {"double_quant": False}, {"quantized": tmp_path / "x"}):
        flag = re.escape(next(iter(changes)).replace("_", "-"))
        said = refused(replace(options, base=out, **changes), capsys)
        assert re.search(rf"is quantized already, and --(no-)?{flag} can be used for 16-bit models only", said)
    assert "is a run of qsvd train: give its quantized model" in refused(
        replace(options, base=str(options.out)), capsys
    )
