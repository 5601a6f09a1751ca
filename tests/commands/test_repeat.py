"""The same commands give the same bytes, in another folder and after an interruption; what differs is declared here."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from qsvd.cli import run
from tests.commands.folders import files_of
from tests.runs import interrupting, text_rows, training, words, write_rows

pytestmark = pytest.mark.slow

# What depends on the clock, on the memory of the process or on the place of OUT, by the name of the file.
CLOCK = {"seconds", "first_step_seconds", "peak_bytes", "peak", "activations and all else", "libraries"}
PLACE = {"base", "base_model_name_or_path"}  # an absolute path: a run and an adapter are opened from anywhere
SINCE_RESUMED = {"moved_bytes"}
OWN = {"qsvd_digest"}  # of a record with such values; the digests of these files in other records differ, too
MACHINE = re.compile(rb'<section id="machine".*?</section>', re.DOTALL)  # of the page of a run: speed and memory
DECLARED = {
    "run/steps.jsonl": CLOCK | OWN,
    "run/summary.json": CLOCK | OWN | {"steps.jsonl", "qsvd_adapter.json"},
    "run/qsvd_adapter.json": PLACE | OWN,
    "run/checkpoint-2/qsvd_adapter.json": PLACE | OWN,
    "run/checkpoint-2/qsvd_files.json": OWN | {"qsvd_adapter.json"},
    "run/checkpoint-4/qsvd_adapter.json": PLACE | OWN,
    "run/checkpoint-4/qsvd_files.json": OWN | {"qsvd_adapter.json"},
    "run/adapter_config.json": PLACE,
    "to-peft/adapter_config.json": PLACE,
    "to-peft/qsvd_export.json": PLACE | OWN | {"adapter_config.json"},
}


def kept(value, left_out):
    """A value of JSON without these keys, at any depth."""
    if isinstance(value, dict):
        return {key: kept(item, left_out) for key, item in value.items() if key not in left_out}
    return [kept(item, left_out) for item in value] if isinstance(value, list) else value


def compared(folder, declared=DECLARED):
    """Path -> content of every file, but for what is declared to differ."""
    found = {}
    for name, content in files_of(folder).items():
        if name.endswith("report.html"):
            content = MACHINE.sub(b"", content)
        lines = content.decode().splitlines() if name.endswith(".jsonl") else [content]
        found[name] = [kept(json.loads(line), declared[name]) for line in lines] if name in declared else content
    return found


def quantized(folder, source):
    """A folder with a 16-bit model and data, and OUT, made by relative paths from here on."""
    folder.mkdir()
    shutil.copytree(source, folder / "model")
    write_rows(folder / "d.jsonl", text_rows())
    os.chdir(folder)
    assert run(["quantize", "model", "--out", "out", "--rank", "4", "--iterations", "1", "--device", "cpu"]) == 0


def options(**changes):
    chosen = {"accumulate": 1, "save_every": 2, "eval_every": 2, "held_out": 0.3, "keep_best": True, "any_start": True}
    return words(training("out", "d.jsonl", "run", **(chosen | changes)))


CODECS = ("nf2-32-3x64-fit", "nf4-16-4x64-fit")


def made(folder, source):
    """A folder with OUT, a run and what comes from it."""
    quantized(folder, source)
    assert run(options()) == 0
    for form in ("peft", "merged", "lora"):
        assert run(["export", "run", "--to", form, "--out", f"to-{form}", "--no-check"]) == 0
    assert run(["calibrate", "model", "d.jsonl", "--out", "s", "--examples", "2", "--device", "cpu"]) == 0
    grid = ["--codecs", *CODECS, "--ranks", "0", "4"]
    assert run(["allocate", "model", "--budget", "3bits", *grid, "--out", "a.txt", "--device", "cpu"]) == 0
    mixed = ["quantize", "model", "--out", "mixed", "--allocation", "a.txt", "--device", "cpu"]
    assert run([*mixed, "--objective", "fisher", "--statistics", "s", "--iterations", "1"]) == 0
    return folder


@pytest.fixture(scope="module")
def source(tiny):
    return tiny.parent / "source"


@pytest.fixture(scope="module")
def place(source, tmp_path_factory):
    """Such a folder."""
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path_factory.mktemp("places"))  # and back
        return made(Path.cwd() / "a", source)


def test_another_place_and_another_time_change_no_byte(place, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = made(tmp_path / "b", source)
    first, second = compared(place), compared(other)
    assert {
        "run/report.html",
        "out/report.html",
        "run/README.md",
        "run/checkpoint-4/trainer_state.json",
    } <= first.keys()
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []
    differing = {name for name in DECLARED if compared(place, {})[name] != compared(other, {})[name]}
    assert differing == DECLARED.keys(), "nothing is declared that is the same"


def test_an_interruption_changes_no_byte_of_a_run(place, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quantized(tmp_path / "c", source)
    with monkeypatch.context() as patched:
        interrupting(patched, 1, 3)
        assert run(options()) == 130
        assert run(options()) == 130
    assert run(options()) == 0
    declared = {name.removeprefix("run/"): keys | SINCE_RESUMED for name, keys in DECLARED.items()}
    straight, resumed = compared(place / "run", declared), compared(tmp_path / "c" / "run", declared)
    assert straight.keys() == resumed.keys()
    assert [name for name in straight if straight[name] != resumed[name]] == []
