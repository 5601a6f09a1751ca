"""Checkpoints are whole or passed over, hold no more than what resuming needs, and only the newest stay."""

import json
import os
import shutil

import pytest
import torch

from qsvd.training.checkpoints import PARTS, checkpoints, finish, make_way, step_of
from tests.runs import TRAINED, sequences, settings, trainer

FILES = {
    "qsvd_files.json",
    "optimizer.pt",
    "qsvd_adapter.json",
    TRAINED,
    "rng_state.pth",
    "scheduler.pt",
    "trainer_state.json",
}


def write(folder, parts=PARTS):
    folder.mkdir(parents=True)
    for part in parts:
        (folder / part).write_bytes(b"x")


def names(paths):
    return [path.name for path in paths]


def test_checkpoints_come_in_the_order_of_their_steps(tmp_path):
    for step in (100, 20, 3):
        write(tmp_path / f"checkpoint-{step}")
    assert names(checkpoints(tmp_path)) == ["checkpoint-3", "checkpoint-20", "checkpoint-100"]
    assert [step_of(path) for path in checkpoints(tmp_path)] == [3, 20, 100]


@pytest.mark.parametrize("missing", PARTS)
def test_one_that_lacks_a_part_is_passed_over(tmp_path, missing):
    write(tmp_path / "checkpoint-5")
    write(tmp_path / "checkpoint-10", [part for part in PARTS if part != missing])
    assert names(checkpoints(tmp_path)) == ["checkpoint-5"]


def test_other_names_are_no_checkpoints(tmp_path):
    for name in ("checkpoint-", "checkpoint-5x", "my-checkpoint-5", "unfinished"):
        write(tmp_path / name)
    assert checkpoints(tmp_path) == []
    assert checkpoints(tmp_path / "nothing") == []


def test_what_a_killed_run_has_left_makes_way_and_files_of_others_do_not(tmp_path):
    write(tmp_path / "checkpoint-4", [*PARTS, "qsvd_files.json", "optimizer.pt.partial"])
    make_way(tmp_path / "checkpoint-4")
    make_way(tmp_path / "nothing")
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "checkpoint-4", ["photo.jpg"])
    with pytest.raises(OSError, match="qsvd did not write"):
        make_way(tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-5").symlink_to("checkpoint-4")
    with pytest.raises(OSError, match="qsvd did not write"):
        make_way(tmp_path / "checkpoint-5")


def test_finishing_moves_it_into_its_place_and_drops_the_oldest(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path / f"checkpoint-{step}")
    write(tmp_path / "unfinished" / "checkpoint-4")
    finish(tmp_path, 4, keep=2, best=None)
    assert sorted(names(tmp_path.iterdir())) == ["checkpoint-3", "checkpoint-4"]


def test_one_of_an_interruption_goes_with_the_next_and_keeps_none_out(tmp_path):
    for step in (2, 4, 5):  # 5: of Ctrl-C
        write(tmp_path / f"checkpoint-{step}")
    write(tmp_path / "unfinished" / "checkpoint-6")
    finish(tmp_path, 6, keep=2, best=None, every=2)
    assert names(checkpoints(tmp_path)) == ["checkpoint-4", "checkpoint-6"]
    write(tmp_path / "unfinished" / "checkpoint-7")
    finish(tmp_path, 7, keep=1, best=4, every=2)
    assert names(checkpoints(tmp_path)) == ["checkpoint-4", "checkpoint-7"]


def test_every_file_is_on_the_disk_before_the_checkpoint_is_in_its_place(tmp_path, monkeypatch):
    written, synced = tmp_path / "unfinished" / "checkpoint-4", set()
    write(written)
    files = {path.stat().st_ino for path in (written, *written.iterdir())}
    monkeypatch.setattr("os.fsync", lambda number: written.exists() and synced.add(os.fstat(number).st_ino))
    finish(tmp_path, 4, keep=2, best=None)
    assert synced >= files  # and that of their digests
    assert not written.exists()


def test_finishing_replaces_one_of_the_same_step(tmp_path):
    write(tmp_path / "checkpoint-4", PARTS[:2])
    write(tmp_path / "unfinished" / "checkpoint-4")
    finish(tmp_path, 4, keep=1, best=None)
    assert names(checkpoints(tmp_path)) == ["checkpoint-4"]


def test_a_checkpoint_has_the_adapter_and_what_resuming_needs(language, tmp_path):
    made = trainer(language, tmp_path, sequences(), settings(steps=5, save_every=1, keep=3))
    made.train()
    assert sorted(names(tmp_path.iterdir())) == ["checkpoint-3", "checkpoint-4", "checkpoint-5"]
    last = tmp_path / "checkpoint-5"
    assert {path.name for path in last.iterdir()} == FILES
    size = (last / TRAINED).stat().st_size
    assert sum(path.stat().st_size for path in last.iterdir()) < 5 * size  # Adam keeps twice the adapter
    assert size == pytest.approx(4 * sum(p.numel() for p in made.model.parameters() if p.requires_grad), rel=0.02)


def test_a_checkpoint_and_the_end_of_the_run_are_the_same_adapter(language, tmp_path):
    made = trainer(language, tmp_path, sequences(), settings(steps=2))
    made.train()
    made.model.save_pretrained(tmp_path / "end")
    assert (tmp_path / "end" / TRAINED).read_bytes() == (tmp_path / "checkpoint-2" / TRAINED).read_bytes()


def test_an_interrupted_save_is_written_again(language, tmp_path):
    write(tmp_path / "unfinished" / "checkpoint-2", [*PARTS, TRAINED, "qsvd_files.json"])
    trainer(language, tmp_path, sequences(), settings(steps=2)).train()
    assert names(tmp_path.iterdir()) == ["checkpoint-2"]
    assert torch.load(tmp_path / "checkpoint-2" / "optimizer.pt", weights_only=True)["state"]
    digests = json.loads((tmp_path / "checkpoint-2" / "qsvd_files.json").read_text())["files"]
    assert digests.keys() == FILES - {"qsvd_files.json"}


def test_a_checkpoint_of_another_model_is_refused(language, tmp_path):
    trainer(language, tmp_path, sequences(), settings(steps=1)).train()
    shutil.copytree(tmp_path / "checkpoint-1", tmp_path / "copy")
    made = trainer(language, tmp_path / "other", sequences(), settings(steps=2), labels=("a", "b"))
    with pytest.raises(ValueError, match=r"copy does not fit the model: 1 parameters are missing: score\.weight$"):
        made.train(resume_from_checkpoint=str(tmp_path / "copy"))
