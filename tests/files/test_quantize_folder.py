"""An output folder grows by whole parts; what the parts hold is judged by the safetensors library."""

import errno
import json
import os
import subprocess

import pytest
import safetensors
import safetensors.torch
import torch

import qsvd.files.quantize_folder
from qsvd.files.atomic import write_json, write_text
from qsvd.files.layout import digest
from qsvd.files.quantize_folder import OutputFolder
from qsvd.files.safetensors import new_tensor

IDENTITY = {"rank": 4, "seed": 0, "include": ["*.q"]}
RECORD = {"name": "a.b", "before": [0.1, 2.5e-17], "note": "ein Gewicht, schwer zu kürzen"}


def residual(number):
    return {f"{number}.weight": torch.arange(8, dtype=torch.uint8) + number, f"{number}.weight.absmax": torch.ones(2)}


def factors(number):
    return {f"{number}.lora_A.weight": torch.full((2, 3), float(number), dtype=torch.bfloat16)}


def open_folder(folder, **changes):
    return OutputFolder(folder, IDENTITY | changes)


def names_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


def test_a_saved_weight_is_done_and_comes_back(tmp_path):
    folder = open_folder(tmp_path / "out")
    assert not folder.is_complete
    assert not folder.is_done(3)
    folder.save(3, residual(3), factors(3), RECORD, "s")
    assert folder.is_done(3)
    assert not folder.is_done(0)
    assert folder.weight_record(3) == RECORD
    assert folder.residual_sha256(3) == digest(residual(3))
    assert names_in(tmp_path / "out" / "unfinished") == {"run.json", "00003.residual", "00003.factors"}


def test_a_later_run_of_the_same_identity_finds_what_is_done(tmp_path):
    first = open_folder(tmp_path)
    first.save(0, residual(0), factors(0), RECORD, "s")
    del first
    again = open_folder(tmp_path)
    assert again.is_done(0)
    assert again.weight_record(0) == RECORD


def test_every_difference_of_another_identity_is_named_and_nothing_changes(tmp_path):
    first = open_folder(tmp_path)
    first.save(0, residual(0), factors(0), RECORD, "s")
    del first
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="was written with other options") as error:
        open_folder(tmp_path, rank=8, include=["*"], stop="rise")
    assert 'include ["*.q"] there, ["*"] now; rank 4 there, 8 now; stop null there, "rise" now;' in str(error.value)
    assert "seed" not in str(error.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_two_runs_at_once_in_one_folder_are_refused(tmp_path):
    first = open_folder(tmp_path)
    with pytest.raises(ValueError, match="another qsvd process is writing to"):
        open_folder(tmp_path)
    assert not first.is_complete


def test_a_shard_joins_residuals_and_copies_and_drops_the_residuals(tmp_path):
    source = tmp_path / "source.safetensors"
    safetensors.torch.save_file({"norm.weight": torch.rand(5).half(), "unused": torch.rand(2)}, source)
    folder = open_folder(tmp_path / "out")
    for number in (0, 1):
        folder.save(number, residual(number), factors(number), RECORD, "s")
    norm = qsvd.files.quantize_folder.read_header(source).tensors["norm.weight"]
    folder.write_shard("model.safetensors", [0, 1], [new_tensor(norm.name, norm)])
    shard = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    expected = residual(0) | residual(1) | {"norm.weight": safetensors.torch.load_file(source)["norm.weight"]}
    assert shard.keys() == expected.keys()
    assert all(
        torch.equal(shard[name], tensor) and shard[name].dtype == tensor.dtype for name, tensor in expected.items()
    )
    with safetensors.safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata().items() >= {"format": "pt"}.items()
    assert names_in(tmp_path / "out") == {
        "model.safetensors",
        "unfinished/run.json",
        "unfinished/00000.factors",
        "unfinished/00001.factors",
    }
    assert folder.is_done(0), "the journal outlives the residual"


def test_an_adapter_joins_all_factors_under_the_fingerprint(tmp_path):
    folder = open_folder(tmp_path)
    for number in (0, 1):
        folder.save(number, residual(number), factors(number), RECORD, "s")
    for _ in range(2):  # a resumed run writes it again
        folder.write_adapter("adapter_model.safetensors", range(2), {"qsvd_base_fingerprint": "f00d"})
    path = tmp_path / "adapter_model.safetensors"
    found = safetensors.torch.load_file(path)
    expected = factors(0) | factors(1)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata().items() >= {"format": "pt", "qsvd_base_fingerprint": "f00d"}.items()


def test_a_complete_folder_says_so_and_still_refuses_another_identity(tmp_path):
    folder = open_folder(tmp_path)
    write_json(tmp_path / "qsvd.json", {"run": IDENTITY})
    folder.close()
    assert names_in(tmp_path) == {"qsvd.json"}
    assert not (tmp_path / "unfinished").exists()
    assert open_folder(tmp_path).is_complete
    with pytest.raises(ValueError, match="seed 0 there, 1 now"):
        open_folder(tmp_path, seed=1)


def test_a_weight_whose_second_file_was_not_finished_is_not_done(tmp_path, monkeypatch):
    folder = open_folder(tmp_path)
    replace = os.replace

    def no_factors(source, target):
        if str(target).endswith(".factors"):
            raise OSError(errno.EIO, "gone")
        replace(source, target)

    monkeypatch.setattr(os, "replace", no_factors)
    with pytest.raises(OSError, match="gone"):
        folder.save(0, residual(0), factors(0), RECORD, "s")
    assert not folder.is_done(0)
    assert names_in(tmp_path) == {"unfinished/run.json", "unfinished/00000.residual"}


def test_a_full_disk_leaves_the_earlier_weights_and_no_part(tmp_path, monkeypatch):
    folder = open_folder(tmp_path)
    folder.save(0, residual(0), factors(0), RECORD, "s")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        folder.save(1, residual(1), factors(1), RECORD, "s")
    with pytest.raises(OSError, match="No space left"):
        folder.write_shard("model.safetensors", [0], [])
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / "config.json", "{}")
    assert names_in(tmp_path) == {"unfinished/run.json", "unfinished/00000.residual", "unfinished/00000.factors"}
    monkeypatch.undo()
    folder.write_shard("model.safetensors", [0], [])
    assert safetensors.torch.load_file(tmp_path / "model.safetensors").keys() == residual(0).keys()


def full_disk(*_arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_parts_that_a_kill_left_are_not_trusted(tmp_path):
    first = open_folder(tmp_path)
    first.save(0, residual(0), factors(0), RECORD, "s")
    for part in ("00001.residual.partial", "00001.factors.partial", "00000.factors.partial", "run.json.partial"):
        (tmp_path / "unfinished" / part).write_bytes(b"\x08half")
    (tmp_path / "model.safetensors.partial").write_bytes(b"half")
    del first
    again = open_folder(tmp_path)
    assert [again.is_done(number) for number in (0, 1)] == [True, False]
    again.save(1, residual(1), factors(1), RECORD, "s")
    again.write_shard("model.safetensors", [0, 1], [])
    again.close()
    assert names_in(tmp_path) == {"model.safetensors"}


def test_a_folder_of_something_else_is_refused_untouched(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(
        ValueError, match="is not empty and was not written by qsvd quantize; give --out another folder"
    ):
        open_folder(tmp_path)
    assert names_in(tmp_path) == {"thesis.tex"}


def test_text_appears_whole_in_utf8_and_replaces_what_was_there(tmp_path):
    path = tmp_path / "report.md"
    path.write_text("old and longer than the new one")
    write_text(path, "größer ±\n")
    assert path.read_bytes() == b"gr\xc3\xb6\xc3\x9fer \xc2\xb1\n"
    assert names_in(tmp_path) == {"report.md"}


def test_text_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "report.md"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert names_in(tmp_path) == {"report.md"}


def test_json_is_indented_keeps_every_digit_and_letter_and_ends_its_line(tmp_path):
    write_json(tmp_path / "x.json", {"größe": [0.1 + 0.2, 1e-300]})
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert text == '{\n  "größe": [\n    0.30000000000000004,\n    1e-300\n  ]\n}\n'
    assert json.loads(text) == {"größe": [0.1 + 0.2, 1e-300]}


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no permission to mount a small file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_is_really_full_leaves_the_earlier_weights_and_no_part(small_disk):
    folder = open_folder(small_disk / "out")
    folder.save(0, residual(0), factors(0), RECORD, "s")
    with pytest.raises(OSError, match="No space left"):
        folder.save(1, residual(1) | {"1.large": torch.zeros(10**5)}, factors(1), RECORD, "s")
    assert names_in(small_disk / "out" / "unfinished") == {"run.json", "00000.residual", "00000.factors"}
    folder.save(1, residual(1), factors(1), RECORD, "s")
    assert folder.is_done(1)
