"""What `qsvd aggregate` cannot average is refused in one sentence, before it makes anything."""

import re
import shutil

import pytest

from qsvd.adapters.methods.table import METHODS
from qsvd.cli import run as command
from tests.commands.trained_runs import LABELS, write_run
from tests.export.cases import make_base


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two quantized models and runs on them."""
    folder = tmp_path_factory.mktemp("refusals")
    base, other = (make_base(folder / name, rank=rank) / "out" for name, rank in (("base", 4), ("other", 2)))
    for name, method, on, labels in (
        ("one", "lora", base, ()),
        ("two", "lora", base, ()),
        ("strange", "lora", other, ()),
        ("dora", "dora", base, ()),
        ("labelled", "lora", base, LABELS),
    ):
        write_run(on, folder / name, method, labels=labels)
    template = write_run(base, folder / "template", "lora")
    template.trained_template = "{{ messages }}"
    template.save_pretrained(folder / "template")
    return folder


@pytest.fixture
def refused(folder, tmp_path, monkeypatch, capsys):
    """Run the command in the folder of the runs, which must be refused before it makes anything; the sentence."""
    monkeypatch.chdir(folder)

    def refuse(*words, out=tmp_path / "never"):
        capsys.readouterr()
        assert command(["aggregate", *map(str, words), "--out", str(out)]) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        (sentence,) = shown.err.splitlines()
        assert not (tmp_path / "never").exists()
        return sentence.removeprefix("qsvd: ")

    return refuse


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("one",), "one is given, and an average needs at least two runs"),
        (("one", "two", "--rank", 0), "--rank 0 is below 1"),
        (("one", "two", "--weights", 1), "--weights has 1 numbers for 2 runs: give one for each"),
        (("one", "two", "--weights", 1, 0), "--weights (1.0, 0.0) has a number that is not finite and above 0"),
        (("one", "nothing", "none"), "no folder nothing, none here; give runs of qsvd train"),
        (("one", "base/out"), "base/out is a quantized model; give runs of qsvd train"),
        (("base/source", "one"), "base/source is a 16-bit model; give runs of qsvd train"),
        (
            ("one", "labelled"),
            f"labelled has the classes {', '.join(LABELS)}, and one has none; give runs with the same classes",
        ),
        (
            ("one", "template"),
            "template was trained with another chat template than one; give runs with the same one",
        ),
        (
            ("one", "dora"),
            "dora was trained by dora, which scales the rows of each weight: the average of such weights is not a "
            "product of two factors; give runs of methods that qsvd methods lists as PEFT LoRA",
        ),
    ],
)
def test_what_is_no_average_of_runs_is_refused(refused, words, said):
    assert refused(*words) == said


def test_runs_on_different_quantized_models_are_refused(refused):
    said = r"strange was trained on another quantized model than one: the fingerprints differ \(\w{12} and \w{12}\); .*"
    assert re.fullmatch(said, refused("one", "strange"))


def test_a_method_that_is_no_product_is_refused(refused, monkeypatch):
    monkeypatch.setattr(METHODS["lora"], "delta", lambda *_: None)
    said = "one was trained by lora, and cannot be averaged: lora trains a part that is no product of two factors"
    assert refused("one", "two").startswith(said)


def test_folders_with_something_else_in_them_are_refused(refused, folder, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    said = f"{tmp_path / 'full'} is not empty and was not written by qsvd aggregate; give --out another folder"
    assert refused("one", "two", out=tmp_path / "full") == said
    assert refused("one", "two", out=tmp_path / "full" / "notes.txt").endswith("is not a folder; give another name")
    shutil.copytree(folder / "one", tmp_path / "run")
    assert "was not written by qsvd aggregate" in refused("one", "two", out=tmp_path / "run")
