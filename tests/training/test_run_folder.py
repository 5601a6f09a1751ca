"""RUN: who may write in it, and what was told there is told again."""

import json
import pickle
import resource
import signal
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from qsvd.errors import BadInput, Damaged
from qsvd.training.checkpoints import PARTS, check_readable, finish, written_whole
from qsvd.training.run_folder import IDENTITY, LOCK, START, STEPS, SUMMARY, UNFINISHED, RunFolder, Start, Step
from tests.sealed import opened, reseal
from tests.stops import FORK

ME = {"rank": 4, "map": ["a=text"], "steps": None}


def step(number):
    return Step(number, 1.0 / number, 0.5, 1e-4, 10 * number, 0.25 * number, 1000)


def refused(folder, sentence, *, identity=ME, resume=False):
    with pytest.raises(ValueError, match=sentence):
        RunFolder(folder, identity, resume=resume, total=9)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("resume", [False, True])
def test_a_new_folder_is_made_with_its_parents_and_its_identity(tmp_path, resume):
    folder = tmp_path / "some" / "run"
    with RunFolder(folder, ME, resume=resume, total=9, command="qsvd train") as run:
        assert names(folder) == [LOCK, IDENTITY]
        assert (run.summary, run.start, run.steps()) == (None, None, [])
    assert names(folder) == [IDENTITY]
    assert opened(folder / IDENTITY) == ME | {"format": 4, "command": "qsvd train", "total_steps": 9}


def test_an_empty_folder_or_one_that_a_kill_left_locked_is_taken(tmp_path):
    (tmp_path / LOCK).touch()
    (tmp_path / f"{IDENTITY}.partial").touch()
    with RunFolder(tmp_path, ME, resume=False, total=9):
        pass
    assert names(tmp_path) == [IDENTITY]


def test_a_file_or_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "file").touch()
    refused(tmp_path / "file", r"file is not a folder; give --out another folder$")
    refused(tmp_path, r"is not empty and was not written by qsvd train; give --out another folder$", resume=True)
    assert names(tmp_path) == ["file"]


def save(folder, step):
    """A checkpoint, by its parts."""
    for part in PARTS:
        (folder / f"checkpoint-{step}").mkdir(exist_ok=True)
        (folder / f"checkpoint-{step}" / part).touch()


@pytest.mark.parametrize("left", [[], [START, STEPS], ["checkpoint-5"]])
def test_a_run_that_saved_nothing_makes_way_for_another(tmp_path, left):
    with RunFolder(tmp_path, ME, resume=False, total=9):
        pass
    for name in left:
        (tmp_path / name).mkdir() if name.startswith("checkpoint") else (tmp_path / name).write_text("{}")
    with RunFolder(tmp_path, ME | {"rank": 8}, resume=False, total=9):
        pass
    assert json.loads((tmp_path / IDENTITY).read_text())["rank"] == 8


@pytest.mark.parametrize("other", ["README.md", "unfinished/notes.txt", None])
def test_a_folder_of_somebody_else_that_has_a_run_json_is_not_taken(tmp_path, other):
    with RunFolder(tmp_path, ME, resume=False, total=9):
        pass
    if other is None:
        (tmp_path / IDENTITY).write_text('{"mine": 1}')
    else:
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).write_text("mine")
    before = (tmp_path / IDENTITY).read_text()
    refused(tmp_path, "is not empty and was not written by qsvd train; give --out another folder", resume=True)
    assert (tmp_path / IDENTITY).read_text() == before


def test_a_damaged_checkpoint_is_refused_and_none_of_its_code_is_run(tmp_path):
    class Marker:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    save(tmp_path, 5)
    folder = tmp_path / "checkpoint-5"
    (folder / "trainer_state.json").write_text("{}")
    torch.save({}, folder / "scheduler.pt")
    torch.save({"numpy": np.random.RandomState(0).get_state(), "python": (1, 2)}, folder / "rng_state.pth")
    torch.save({"state": torch.ones(64)}, folder / "optimizer.pt")
    check_readable(folder, sealed=False)
    whole = (folder / "optimizer.pt").read_bytes()
    for content in (b"", whole[:300], pickle.dumps(Marker(), protocol=2)):
        (folder / "optimizer.pt").write_bytes(content)
        with pytest.raises(BadInput, match=r"optimizer.pt is damaged \(.*\)$"):
            check_readable(folder, sealed=False)
    assert not (tmp_path / "ran").exists()


def test_a_complete_run_is_kept_even_without_checkpoints(tmp_path):
    with RunFolder(tmp_path, ME, resume=False, total=9) as run:
        run.write(SUMMARY, {})
    refused(tmp_path, "was written with other options: rank 4 there, 8 now", identity=ME | {"rank": 8})


def test_a_run_is_continued_with_the_same_options_and_extended_only_when_asked(tmp_path):
    with RunFolder(tmp_path, ME, resume=False, total=9):
        save(tmp_path, 5)
    longer = (
        r"was written with other options: steps null there, 9 now; give the same options to continue, or --resume for "
        r"more steps, or give --out another folder$"
    )
    refused(tmp_path, longer, identity=ME | {"steps": 9})
    other = {"rank": 8, "map": ["a=text"], "seed": 1}
    sentence = (
        r"was written with other options: rank 4 there, 8 now; seed null there, 1 now; give the same options to "
        r"continue, or give --out another folder$"
    )
    refused(tmp_path, sentence, identity=other, resume=True)
    for resume in (False, True):
        with RunFolder(tmp_path, ME | {"map": ("a=text",)}, resume=resume, total=9):  # JSON has no tuples
            pass


def test_two_cannot_write_at_once(tmp_path):
    with RunFolder(tmp_path, ME, resume=False, total=9):
        refused(tmp_path, r"^another qsvd process is writing to .*; wait for it, or stop it$", resume=True)
    with RunFolder(tmp_path, ME, resume=True, total=9):
        pass


def test_the_folder_is_let_go_after_an_error(tmp_path):
    with pytest.raises(KeyboardInterrupt), RunFolder(tmp_path, ME, resume=False, total=9):
        raise KeyboardInterrupt
    assert names(tmp_path) == [IDENTITY]


@pytest.mark.parametrize("name", [IDENTITY, SUMMARY])
def test_a_damaged_file_is_named(tmp_path, name):
    with RunFolder(tmp_path, ME, resume=False, total=9) as run:
        (tmp_path / name).write_text("{")
        with pytest.raises(ValueError, match=rf"{name} is not valid JSON \(.*\); give --out another folder$"):
            _ = run.summary if name == SUMMARY else RunFolder(tmp_path, ME, resume=True, total=9)


def test_steps_are_read_back_and_a_torn_last_line_is_left_out(tmp_path):
    with RunFolder(tmp_path, ME, resume=False, total=9) as run:
        for number in (1, 2, 3):
            run.add_step(step(number))
        assert run.steps() == [step(1), step(2), step(3)]
        whole = (tmp_path / STEPS).read_text()
        for length in range(len(whole) - len(json.dumps({})), len(whole)):
            (tmp_path / STEPS).write_text(whole[:length])
            assert run.steps() == [step(1), step(2)]


def test_steps_that_are_made_again_are_forgotten(tmp_path):
    with RunFolder(tmp_path, ME, resume=False, total=9) as run:
        for number in (1, 2, 3):
            run.add_step(step(number))
        assert run.keep_steps(2) == run.steps() == [step(1), step(2)]
        run.add_step(step(3))
        assert run.steps() == [step(1), step(2), step(3)]
        assert run.keep_steps(0) == run.steps() == []


def test_what_is_written_is_read_and_what_was_changed_is_refused(tmp_path):
    with RunFolder(tmp_path, ME, resume=False, total=9) as run:
        run.write(START, {"held_out_before": None, "accuracy_before": 0.5})
        assert run.start == Start(None, 0.5)
        (tmp_path / START).write_text((tmp_path / START).read_text().replace("0.5", "0.6"))
        with pytest.raises(Damaged, match=r"start\.json is damaged: its digest differs; give --out another folder$"):
            _ = run.start
        for digest in ('"\\ud800"', '""', "3", "null"):
            (tmp_path / START).write_text(f'{{"accuracy_before": 0.5, "qsvd_digest": {digest}}}')
            with pytest.raises(Damaged, match=r"start\.json is damaged: its digest differs"):
                _ = run.start
        reseal(tmp_path / START, lambda fields: fields.update(accuracy_before="x", other=1))
        fault = "other is unknown; accuracy_before is 'x', not a finite number of 0 or more"
        with pytest.raises(BadInput, match=fault):
            _ = run.start
        run.add_step(step(1))
        (tmp_path / STEPS).write_text((tmp_path / STEPS).read_text().replace('"loss": 1.0', '"loss": 2.0'))
        with pytest.raises(Damaged, match=r"line 1 of .*steps\.jsonl is damaged: its digest differs"):
            run.steps()
        (tmp_path / STEPS).unlink()
        run.add_step(step(2))
        with pytest.raises(Damaged, match=r"line 1 of .*steps\.jsonl is step 2, not step 1: a line is missing"):
            run.steps()


def test_a_run_of_an_older_version_without_digests_goes_on_without(tmp_path):
    save(tmp_path, 5)
    (tmp_path / IDENTITY).write_text(json.dumps(ME))
    (tmp_path / START).write_text('{"held_out_before": 2}')
    (tmp_path / STEPS).write_text(json.dumps(asdict(step(1))) + "\n")
    with RunFolder(tmp_path, ME, resume=False, total=9) as run:
        assert (run.start, run.steps()) == (Start(2.0), [step(1)])
        run.add_step(step(2))
    assert "format" not in json.loads((tmp_path / IDENTITY).read_text())
    with RunFolder(tmp_path, ME, resume=False, total=9) as run:
        assert run.steps() == [step(1), step(2)]
    (tmp_path / STEPS).write_text('{"number": -1}\n')
    with (
        RunFolder(tmp_path, ME, resume=False, total=9) as run,
        pytest.raises(BadInput, match=r"line 1 of .*loss is missing"),
    ):
        run.steps()


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # Python 3.12
def test_a_disk_that_is_full_while_torch_saves_is_an_error_of_the_disk(tmp_path):
    file, said = tmp_path / UNFINISHED / "checkpoint-1" / "optimizer.pt", FORK.SimpleQueue()
    file.parent.mkdir(parents=True)

    def limited():
        torch.set_num_threads(1)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            with written_whole(tmp_path, 2):
                torch.save({"a": torch.ones(10**6)}, file)
        except OSError as error:
            said.put(str(error))

    process = FORK.Process(target=limited)
    process.start()
    process.join(timeout=600)
    assert process.exitcode == 0
    assert said.get() == f"[Errno 27] File too large: '{file}'"
    with pytest.raises(RuntimeError, match="another"), written_whole(tmp_path, 2):
        raise RuntimeError("another")


def checkpoint(folder):
    folder.mkdir(parents=True)
    for part in PARTS:
        (folder / part).touch()
    return folder


def test_files_of_somebody_else_in_checkpoints_stay(tmp_path, caplog):
    old, plain = checkpoint(tmp_path / "checkpoint-1"), checkpoint(tmp_path / "checkpoint-2")
    checkpoint(tmp_path / UNFINISHED / "checkpoint-3")
    (old / "notes.txt").write_text("mine")
    (tmp_path / UNFINISHED / "todo.txt").write_text("mine")
    finish(tmp_path, 3, keep=1, best=None)
    assert names(old) == ["notes.txt"]
    assert not plain.exists()
    assert names(tmp_path / "checkpoint-3") == sorted([*PARTS, "qsvd_files.json"])
    assert names(tmp_path / UNFINISHED) == ["todo.txt"]
    assert caplog.messages == [
        f"{path}: not written by qsvd, and left there"
        for path in (old / "notes.txt", tmp_path / UNFINISHED / "todo.txt")
    ]


def test_a_checkpoint_is_not_written_over_files_of_somebody_else(tmp_path):
    place = checkpoint(tmp_path / "checkpoint-3")
    (place / "notes.txt").write_text("mine")
    checkpoint(tmp_path / UNFINISHED / "checkpoint-3")
    with pytest.raises(OSError, match=r"has files that qsvd did not write, .*: '.*checkpoint-3'"):
        finish(tmp_path, 3, keep=1, best=None)
    assert names(place) == ["notes.txt"]


def test_a_checkpoint_that_a_kill_left_half_removed_is_gone_after_the_next_one(tmp_path):
    (tmp_path / UNFINISHED / "checkpoint-1").mkdir(parents=True)
    (tmp_path / UNFINISHED / "checkpoint-1" / "optimizer.pt").touch()
    checkpoint(tmp_path / UNFINISHED / "checkpoint-3")
    finish(tmp_path, 3, keep=1, best=None)
    assert names(tmp_path) == ["checkpoint-3"]
