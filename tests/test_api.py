"""The commands from Python do what the command line does: the same files, the same numbers, the same refusals."""

import copy
import inspect
import json
import os
import pickle
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

import qsvd
from qsvd.cli import COMMANDS, run
from qsvd.options import Quantize
from tests.commands.folders import files_of
from tests.runs import TRAINED, language_base, text_rows, write_rows

SAME = ("plan", "quantize", "calibrate", "allocate", "prune", "train", "aggregate", "compare", "export")  # names
FUNCTIONS = {"eval": "evaluate"} | {name: name for name in SAME}
PRINTING = {"json", "dry_run", "preview"}
TINY = {"device": "cpu", "steps": 2, "batch_size": 2, "accumulate": 1, "max_length": 32}


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """Two folders with the same 16-bit model and data: one for the command line, one for Python."""
    folder = tmp_path_factory.mktemp("sides")
    source = language_base(folder).parent / "source"
    for side in ("typed", "called"):
        (folder / side).mkdir()
        (folder / side / "M").symlink_to(source)
        write_rows(folder / side / "d.jsonl", text_rows())
    return folder


@pytest.fixture
def both(sides, monkeypatch, capfd):
    """Run a command line in one folder and call a function in the other, which must be silent."""

    def do(words, call):
        monkeypatch.chdir(sides / "typed")
        assert run(words.split()) == 0
        said = capfd.readouterr().out
        monkeypatch.chdir(sides / "called")
        found = call()
        assert capfd.readouterr() == ("", "")
        return said, found

    return do


def same_files(sides, name):
    found = [files_of(sides / side / name) for side in ("typed", "called")]
    assert found[0]
    assert found[0] == found[1]


def test_every_command_gives_what_the_command_line_gives(sides, both):
    """One walk, since each step needs the one before it."""
    said, planned = both("plan M --json --gpu 24GB", lambda: qsvd.plan("M", gpu="24GB"))
    assert planned.fits
    assert planned.train.placed.memory.total("gpu") == json.loads(said)["train"]["total"]["gpu"]

    words = "quantize M --out O --rank 8 --iterations 1 --device cpu"
    _, quantized = both(words, lambda: qsvd.quantize(Path("M"), out="O", rank=8, iterations=1, device="cpu"))
    same_files(sides, "O")
    errors = [json.loads(line) for line in (quantized / "errors.jsonl").read_text().splitlines()]
    assert [error.name for error in quantized.errors] == [error["name"] for error in errors]
    squares = sum(error["after"]["frobenius"] ** 2 for error in errors), sum(e["weight_frobenius"] ** 2 for e in errors)
    assert quantized.error == pytest.approx((squares[0] / squares[1]) ** 0.5)
    assert quantized.error < quantized.error_without_components

    words = "calibrate M d.jsonl --out s.safetensors --examples 2 --device cpu"
    _, statistics = both(words, lambda: qsvd.calibrate("M", "d.jsonl", out="s.safetensors", samples=2, device="cpu"))
    assert statistics.examples == 2
    assert Path(statistics).read_bytes() == (sides / "typed" / "s.safetensors").read_bytes()

    words = "allocate M --budget 6bits --out a.txt --ranks 0 8 --codecs nf4-64-8x256 nf3-64-8x256 --device cpu"
    chosen = {"ranks": [0, 8], "codecs": ("nf4-64-8x256", "nf3-64-8x256"), "device": "cpu"}
    _, table = both(words, lambda: qsvd.allocate("M", budget="6bits", out=Path("a.txt"), **chosen))
    assert table.read_text() == (sides / "typed" / "a.txt").read_text()
    assert table.allocation.choices.keys() == {error.name for error in quantized.errors}

    _, pruned = both("prune M --out P --keep 0.25", lambda: qsvd.prune("M", out="P", keep=0.25))
    same_files(sides, "P")
    assert (pruned.channels, pruned.kept) == (768, 192)

    words = "train O d.jsonl --out R --steps 2 --batch-size 2 --accumulate 1 --max-length 32 --device cpu"
    _, trained = both(words, lambda: qsvd.train(quantized.name, "d.jsonl", out="R", **TINY))
    assert (trained / TRAINED).read_bytes() == (sides / "typed" / "R" / TRAINED).read_bytes()
    steps = [json.loads(line) for line in (sides / "typed" / "R" / "steps.jsonl").read_text().splitlines()]
    assert trained.losses == tuple(step["loss"] for step in steps)
    assert trained.steps == 2

    words = "eval M O R --data d.jsonl --limit 3 --json --device cpu"
    said, scores = both(words, lambda: qsvd.evaluate("M", "O", "R", data="d.jsonl", limit=3, device="cpu"))
    assert [{"model": row.model, "kind": row.kind} | row.values for row in scores.rows] == json.loads(said)["models"]

    _, exported = both("export R --to merged --out E", lambda: qsvd.export("R", to="merged", out="E"))
    same_files(sides, "E")
    assert exported.checked.agreement == 1


def test_progress_is_shown_on_stderr_when_it_is_asked_for(sides, monkeypatch, capfd):
    monkeypatch.chdir(sides / "called")
    qsvd.evaluate("M", data="d.jsonl", limit=2, device="cpu", progress=True)
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.splitlines()[-1].startswith("M: ")


@pytest.mark.parametrize(("command", "function"), FUNCTIONS.items())
def test_help_shows_the_options_of_the_command_with_their_defaults(command, function):
    record, call = COMMANDS[command], getattr(qsvd, function)
    shown = {name: value.default for name, value in inspect.signature(call).parameters.items()}
    assert shown.pop("progress") is False
    defaults = {f.name: inspect.Parameter.empty if f.default is MISSING else f.default for f in fields(record)}
    assert shown == {name: value for name, value in defaults.items() if name not in PRINTING}
    assert [name for name in shown if f"\n    {name}: " not in inspect.getdoc(call)] == []


def test_every_command_has_a_function():
    assert {*COMMANDS} - {*FUNCTIONS} <= {"generate", "report", "verify", "methods", "demo"}


REFUSED = {
    "qsvd.train needs base, data, out": lambda: qsvd.train(),
    "qsvd.quantize needs out": lambda: qsvd.quantize("M"),
    "qsvd.train takes base and data by place, and all other options by name": lambda: qsvd.train("O", "d", "R"),
    "qsvd.quantize takes model by place, and all other options by name": lambda: qsvd.quantize("M", "O"),
    "qsvd.quantize got model twice, by place and by name": lambda: qsvd.quantize("M", model="M", out="O"),
    "qsvd.quantize: unknown option 'rnak' (did you mean rank?)": lambda: qsvd.quantize("M", out="O", rnak=3),
    "qsvd.quantize: rank is '8', not of type int": lambda: qsvd.quantize("M", out="O", rank="8"),
    "qsvd.train: resident is 'no', not one of auto": lambda: qsvd.train("O", "d", out="R", resident="no"),
    "no model is given: name at least one folder": lambda: qsvd.evaluate(data="d.jsonl"),
    "--rank -1 is below 0": lambda: qsvd.quantize("M", out="O", rank=-1),
    "no folder '/none' here": lambda: qsvd.quantize(Path("/none"), out="O"),
    "qsvd.plan prints nothing, so json is an option of the command line only": lambda: qsvd.plan("M", json=True),
    "qsvd.quantize prints nothing, so dry_run is": lambda: qsvd.quantize(Quantize("M", Path("O"), dry_run=True)),
    "--budget and --allocation both set": lambda: qsvd.plan("M", budget="3bits", allocation=Path("a.txt")),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_a_wrong_call_is_refused_in_one_sentence(sentence):
    with pytest.raises(qsvd.BadInput) as caught:
        REFUSED[sentence]()
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_is_raised_by_train_and_told_by_plan(sides, monkeypatch):
    monkeypatch.chdir(sides / "called")
    planned = qsvd.plan("M", gpu="1KB", host="1KB")
    assert not planned.fits
    assert "more GPU memory" in planned.lacking[0]
    base = qsvd.quantize("M", out="O8", rank=8, iterations=1, device="cpu")
    with pytest.raises(qsvd.DoesNotFit, match="CPU memory"):
        qsvd.train(base, "d.jsonl", out="R2", host="1KB", **TINY)


def test_a_result_is_used_as_its_path_and_keeps_its_numbers(sides, monkeypatch):
    monkeypatch.chdir(sides / "called")
    made = qsvd.quantize(Quantize("M", Path("O8"), rank=8, iterations=1, device="cpu"))
    assert os.fspath(made) == str(made) == "O8"
    assert (made.name, made.is_dir(), made / "x") == ("O8", True, Path("O8/x"))
    assert pickle.loads(pickle.dumps(made)) == copy.deepcopy(made) == made
    with pytest.raises(AttributeError, match="nothing"):
        made.nothing  # noqa: B018  # asked for, to be refused
