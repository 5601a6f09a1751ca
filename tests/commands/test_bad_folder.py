"""Output folders that cannot be used, and records in them that cannot be read: one sentence, nothing touched."""

import re
import subprocess

import pytest

from qsvd.cli import run
from tests.checkpoints import write_checkpoint
from tests.commands.folders import files_of
from tests.sealed import reseal, without_digests


@pytest.fixture
def quantize(model, capsys):
    """Run `qsvd quantize MODEL --out OUT`: the exit code and the only line on stderr that is no progress."""

    def command(out, *flags):
        capsys.readouterr()
        code = run(["quantize", str(model), "--out", str(out), "--rank", "4", "--iterations", "1", *map(str, flags)])
        lines = [
            line
            for line in capsys.readouterr().err.splitlines()
            if not re.search(r"weights, |^Time: |^Done: |^Next: ", line)
        ]
        assert len(lines) == (code != 0)
        return code, "".join(lines).removeprefix("qsvd: ")

    return command


def test_a_folder_with_something_else_in_it(quantize, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    code, sentence = quantize(tmp_path)
    assert code == 2
    assert sentence == f"{tmp_path} is not empty and was not written by qsvd quantize; give --out another folder"
    assert files_of(tmp_path) == {"notes.txt": b"mine"}


def test_a_foreign_folder_that_happens_to_be_called_unfinished_is_not_deleted(quantize, tmp_path):
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "novel.txt").write_text("mine")
    quantize(tmp_path)
    assert (tmp_path / "unfinished" / "novel.txt").read_text() == "mine"


def test_an_empty_folder_is_used(quantize, tmp_path):
    assert quantize(tmp_path) == (0, "")
    assert (tmp_path / "qsvd.json").is_file()


def test_the_folder_of_the_model_itself(quantize, model):
    before = files_of(model)
    code, sentence = quantize(model)
    assert code == 2
    assert "is not empty and was not written by qsvd" in sentence
    assert files_of(model) == before


def test_a_result_of_other_options_names_each_difference(quantize, tmp_path):
    assert quantize(tmp_path)[0] == 0
    before = files_of(tmp_path)
    code, sentence = quantize(tmp_path, "--seed", 5, "--iterations", 2)
    assert code == 2
    assert sentence == (
        f"{tmp_path} was written with other options: iterations 1 there, 2 now; seed 0 there, 5 now; "
        "give the same options to continue, or give --out another folder"
    )
    assert files_of(tmp_path) == before


def test_another_model_of_the_same_shapes_is_not_taken_for_the_one_that_is_done(quantize, model, tmp_path, capsys):
    other, out = tmp_path / "other", tmp_path / "out"
    write_checkpoint(other, seed=1)
    assert (other / "config.json").read_bytes() == (model / "config.json").read_bytes()
    assert quantize(out)[0] == 0
    assert run(["quantize", str(other), "--out", str(out), "--rank", "4", "--iterations", "1"]) == 2
    assert "was written with other options: the 16-bit model changed" in capsys.readouterr().err


def test_a_path_below_a_file(quantize, tmp_path):
    (tmp_path / "file").write_text("mine")
    code, sentence = quantize(tmp_path / "file" / "out")
    assert code == 1
    assert "Not a directory" in sentence
    assert str(tmp_path / "file") in sentence


def test_a_path_that_is_a_file(quantize, tmp_path):
    (tmp_path / "file").write_text("mine")
    code, sentence = quantize(tmp_path / "file")
    assert code in (1, 2)
    assert str(tmp_path / "file") in sentence
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_cannot_be_written(quantize, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    locked = subprocess.run(["chattr", "+i", str(out)], capture_output=True, check=False)
    if locked.returncode:
        pytest.skip("this file system has no immutable folders")
    try:
        code, sentence = quantize(out)
    finally:
        subprocess.run(["chattr", "-i", str(out)], check=True)
    assert code == 1
    assert sentence.startswith(f"{out / 'unfinished'}: Operation not permitted")
    assert quantize(out)[0] == 0


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"run": 3}', "not JSON"])
def test_a_damaged_manifest_is_named(quantize, tmp_path, content):
    (tmp_path / "qsvd.json").write_text(content)
    code, sentence = quantize(tmp_path)
    assert code == 2
    assert "qsvd.json" in sentence


@pytest.mark.parametrize("content", ["", "[]", "not JSON"])
def test_a_damaged_journal_is_named(quantize, tmp_path, content):
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "run.json").write_text(content)
    code, sentence = quantize(tmp_path)
    assert code == 2
    assert "run.json" in sentence


def test_report_of_a_damaged_result_names_the_file_and_the_line(quantize, tmp_path, capsys):
    assert quantize(tmp_path)[0] == 0
    records = (tmp_path / "errors.jsonl").read_text().splitlines()
    (tmp_path / "errors.jsonl").write_text("\n".join([*records[:3], records[3][:-9], *records[4:]]))
    assert run(["report", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"qsvd: {tmp_path / 'errors.jsonl'} is damaged: its digest differs; ")
    without_digests(tmp_path)
    assert run(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"qsvd: {tmp_path / 'errors.jsonl'}, line 4: ")
    reseal(tmp_path / "qsvd.json", lambda manifest: manifest["header"].pop("rank"))
    assert run(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"qsvd: {tmp_path / 'qsvd.json'} is damaged: rank is missing\n"


def test_report_without_its_records_promises_nothing_that_is_not_so(quantize, tmp_path, capsys):
    assert quantize(tmp_path)[0] == 0
    (tmp_path / "errors.jsonl").unlink()
    assert run(["report", str(tmp_path)]) in (1, 2)
    sentence = capsys.readouterr().err
    assert "errors.jsonl" in sentence
    assert "the same command continues there" not in sentence


def test_report_of_a_negative_number_of_weights(tmp_path, capsys):
    assert run(["report", str(tmp_path), "--worst=-1"]) == 2
    assert capsys.readouterr().err == "qsvd: --worst -1 is below 0\n"
