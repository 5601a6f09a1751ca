"""`qsvd report --html`: pages of folders that the commands wrote."""

from dataclasses import replace

import numpy as np
import pytest
from safetensors.torch import load_file

import qsvd
from qsvd.cli import parse, run
from qsvd.commands import report
from qsvd.console import texts
from qsvd.files.quantized.spectrum import kept_values
from qsvd.files.trained.records import read_texts
from qsvd.training.run_folder import RunFolder
from tests.checkpoints import write_checkpoint
from tests.report.page.pages import Page, steps_of
from tests.runs import interrupting, text_rows, training, words, write_rows


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paged")
    write_checkpoint(folder / "source")
    return qsvd.quantize(qsvd.Quantize(str(folder / "source"), out=folder / "out", rank=4, iterations=1)).path


def refused(capsys, *words):
    assert run(["report", *map(str, words)]) == 2
    return capsys.readouterr().err


def test_the_page_that_quantize_wrote_is_written_again_to_the_same_bytes(out, tmp_path, capsys):
    first = (out / "report.html").read_bytes()
    assert run(["report", str(out), "--html"]) == 0
    assert (out / "report.html").read_bytes() == first
    assert run(["report", "--html", str(tmp_path / "page.html"), str(out)]) == 0
    assert (tmp_path / "page.html").read_bytes() == first
    assert capsys.readouterr().out.split() == [str(out / "report.html"), str(tmp_path / "page.html")]
    assert not list(out.glob("*.partial"))


def test_singular_values_are_those_of_the_product(out):
    tensors = load_file(out / "adapter_model.safetensors")
    names = [
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for name in tensors if "lora_A" in name
    ]
    found = kept_values(out, names)
    assert len(found) == len(names) > 3
    for name, values in found.items():
        up, down = (tensors[f"base_model.model.{name}.lora_{part}.weight"].double().numpy() for part in "BA")
        exact = np.linalg.svd(up @ down, compute_uv=False)[: len(values)]
        assert values == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize(
    ("typed", "folders", "page"),
    [
        (["a", "b", "--html"], ["a", "b"], "auto"),
        (["--html", "a"], ["a"], "auto"),
        (["--html", "p.html", "a"], ["a"], "p.html"),
        (["a", "--html=p.HTM"], ["a"], "p.HTM"),
        (["a", "--html", "--live"], ["a"], "auto"),
    ],
)
def test_the_page_may_be_named(typed, folders, page):
    options = parse(["report", *typed])
    assert ([str(folder) for folder in options.folders], str(options.html)) == (folders, page)


def test_what_cannot_be_shown_is_refused(out, tmp_path, capsys):
    (tmp_path / "mine.html").write_text("<p>mine")
    assert "is not a page of qsvd report" in refused(capsys, out, "--html", tmp_path / "mine.html")
    assert "has neither qsvd.json of a quantized model nor run.json of a run" in refused(capsys, tmp_path, "--html")
    assert "no folder" in refused(capsys, tmp_path / "none", "--html", tmp_path / "p.html")
    assert "there is no folder" in refused(capsys, out, "--html", tmp_path / "none" / "p.html")
    assert "give --html for a page that compares them" in refused(capsys, out, out)
    assert "--live writes a page again: give --html too" in refused(capsys, out, "--live")
    assert "exclude each other" in refused(capsys, out, "--json", "--html")
    assert "at most 6" in refused(capsys, *[out] * 7, "--html")


def test_a_live_page_ends_when_nobody_trains_the_run(tmp_path, monkeypatch, capsys):
    """It waits while a process holds the lock, and while steps are added."""
    folder, pauses = tmp_path / "run", []
    held = RunFolder(folder, {}, resume=False, total=9)

    def wait(_):
        pauses.append('http-equiv="refresh"' in (folder / "report.html").read_text())
        if len(pauses) == 2:
            held._lock.release()
            held.add_step(steps_of(1)[0])
        assert len(pauses) < 9

    monkeypatch.setattr(report.time, "sleep", wait)
    assert run(["report", str(folder), "--html", "--live"]) == 0
    assert pauses == [True] * 3
    assert 'http-equiv="refresh"' not in (folder / "report.html").read_text()
    assert f"no process trains {folder}: give the same qsvd train command again" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_has_a_page_with_its_command_which_is_live_until_the_run_is_finished(
    language, tmp_path, monkeypatch, capsys
):
    base = language
    data = write_rows(tmp_path / "d.jsonl", text_rows())
    typed = words(training(base, data, tmp_path / "run", steps=2, save_every=1, held_out=0.3, any_start=True))
    monkeypatch.setattr(texts, "SHARE", 1)
    monkeypatch.setattr(texts, "LEAST_NEW_TOKENS", 4)
    with monkeypatch.context() as patched:
        interrupting(patched, 1)
        assert run(typed) == 130
    pages, before = [], read_texts(tmp_path / "run")
    assert (len(before.examples), before.new_tokens) == (3, 4)

    def finish(seconds):
        assert seconds > 0
        pages.append((tmp_path / "run" / "report.html").read_text())
        assert run(typed) == 0

    monkeypatch.setattr(report.time, "sleep", finish)
    assert run(["report", str(tmp_path / "run"), "--html", "--live"]) == 0
    assert len(pages) == 1
    assert "1 of 2 steps are recorded" in pages[0]
    assert 'http-equiv="refresh"' in pages[0]
    done = (tmp_path / "run" / "report.html").read_text()
    assert 'http-equiv="refresh"' not in done
    assert "qsvd train" in done
    assert "--save-every 1" in done
    after = read_texts(tmp_path / "run").examples
    assert tuple(replace(one, after=None) for one in after) == before.examples
    found = Page(done)
    assert all(text.strip() in found.text for one in after for text in (one.prompt, one.before, one.after))
    capsys.readouterr()
