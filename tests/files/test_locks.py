"""Who may write: one process at a time, under races; and whose files are left alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qsvd.errors import BadInput
from qsvd.files.atomic import LOCK_MARK, Lock, clear, whole_file, write_json, write_text
from qsvd.files.workspace import IDENTITY, LOCK, UNFINISHED, Workspace

PROCESSES, OPENINGS, FOLDERS = 4, 250, 60
OPENER = """
import os, sys, time
from pathlib import Path
from qsvd.errors import BadInput
from qsvd.files.atomic import Lock, write_json
from qsvd.files.workspace import Workspace

class Holder:  # a second holder finds the file
    def __init__(self, name): self.name = f"holder-{name}"
    def __enter__(self): os.close(os.open(self.name, os.O_CREAT | os.O_EXCL))
    def __exit__(self, *_): os.unlink(self.name)

class Folder(Workspace):
    record, command = "record.json", "qsvd quantize"

def opened():  # a process that is refused tries again: the refusal is all that may be raised
    had = 0
    while had < int(sys.argv[2]):
        try:
            with Lock(Path("lock"), Path("here")), Holder(0):
                had += 1
        except BadInput as error:
            assert str(error).startswith("another qsvd process is writing to here"), error

def worked():
    done = 0
    for number in range(int(sys.argv[2])):
        while True:
            try:
                with Folder(Path(f"out-{number}"), {"a": number}) as folder:
                    if not folder.is_complete:
                        with Holder(number):
                            done += 1
                            write_json(folder.folder / "record.json", {"run": folder.identity})
                        folder.close()
                break
            except BadInput as error:
                assert str(error).startswith("another qsvd process is writing to out-"), error
    print(done)

Path(f"ready-{os.getpid()}").touch()
while len(list(Path().glob("ready-*"))) < 4:
    time.sleep(0.001)
{"opened": opened, "worked": worked}[sys.argv[1]]()
"""


class Folder(Workspace):
    record, command = "record.json", "qsvd quantize"


def at_once(folder, *arguments):
    """Run the script in PROCESSES processes; what they print."""
    command = [sys.executable, "-c", OPENER, *map(str, arguments)]
    some = [
        subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(PROCESSES)
    ]
    shown = [one.communicate() for one in some]
    assert [err for _, err in shown] == [""] * PROCESSES
    return [out for out, _ in shown]


def test_a_lock_never_has_two_holders(tmp_path):
    at_once(tmp_path, "opened", OPENINGS)
    assert not (tmp_path / "lock").exists()


def test_a_folder_is_completed_once_and_then_seen_to_be_complete(tmp_path):
    done = at_once(tmp_path, "worked", FOLDERS)
    assert sum(map(int, done)) == FOLDERS
    folders = list(tmp_path.glob("out-*"))
    assert len(folders) == FOLDERS
    assert {tuple(os.listdir(folder)) for folder in folders} == {("record.json",)}


def test_a_lock_file_of_somebody_else_is_neither_taken_nor_removed(tmp_path):
    (tmp_path / LOCK).write_text("my key\n")
    (tmp_path / "target").write_text("mine")
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "folder").mkdir()
    for name in (LOCK, "link", "folder"):
        with pytest.raises(BadInput, match=rf"{name} is not a file of qsvd, which locks here by this n"):
            Lock(tmp_path / name, Path("here"))
    assert (tmp_path / LOCK).read_text() == "my key\n"
    assert (tmp_path / "target").read_text() == "mine"


def test_the_lock_of_a_killed_process_is_taken(tmp_path):
    for left in (LOCK_MARK, b""):
        (tmp_path / LOCK).write_bytes(left)
        with Lock(tmp_path / LOCK, tmp_path):
            assert (tmp_path / LOCK).read_bytes() == LOCK_MARK
        assert not (tmp_path / LOCK).exists()


@pytest.mark.parametrize("kind", ["link to a file", "link to nothing", "folder"])
def test_a_partial_file_that_is_none_is_left_alone(tmp_path, kind):
    target, partial = tmp_path / "target", tmp_path / "a.json.partial"
    if kind == "folder":
        partial.mkdir()
    else:
        partial.symlink_to(target)
    if kind == "link to a file":
        target.write_text("mine")
    with pytest.raises(OSError, match=r"is no file of qsvd's, .*; move it away: '.*a\.json\.partial'"):
        write_json(tmp_path / "a.json", {})
    assert partial.is_symlink() or partial.is_dir()
    assert not (tmp_path / "a.json").exists()
    assert not target.exists() or target.read_text() == "mine"


def test_what_a_kill_left_of_a_partial_file_is_replaced(tmp_path):
    (tmp_path / "a.partial").write_text("half of an old one, which is longer")
    write_text(tmp_path / "a", "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "new"}


def test_a_file_and_then_its_folder_are_synced(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda opened: synced.append(os.readlink(f"/proc/self/fd/{opened}")))
    with whole_file(tmp_path / "a") as file:
        file.write(b"1")
    assert synced == [str(tmp_path / "a.partial"), str(tmp_path)]


def test_only_files_with_our_names_are_removed(tmp_path, caplog):
    folder = tmp_path / "unfinished"
    (folder / "01.part").mkdir(parents=True)
    for name in ("00.part", "notes.txt", "00.part.old"):
        (folder / name).touch()
    (folder / "02.part").symlink_to("notes.txt")
    assert not clear(folder, r"\d\d\.part")
    left = ["00.part.old", "01.part", "02.part", "notes.txt"]
    assert sorted(os.listdir(folder)) == left
    assert caplog.messages == [f"{', '.join(str(folder / name) for name in left)}: not written by qsvd, and left there"]


def test_a_linked_folder_is_not_cleared(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "00.part").touch()
    (tmp_path / UNFINISHED).symlink_to("mine")
    assert not clear(tmp_path / UNFINISHED, r"\d\d\.part")
    assert (tmp_path / "mine" / "00.part").exists()
    with pytest.raises(BadInput, match=r"unfinished is a link, and qsvd quantize makes a folder there; give"):
        Folder(tmp_path, {})


def test_files_of_somebody_else_survive_the_end_of_a_run(tmp_path, caplog):
    with Folder(tmp_path / "out", {"a": 1}) as folder:
        (folder.unfinished / "00001.factors").touch()
        (folder.unfinished / "notes.txt").write_text("mine")
        write_json(folder.folder / "record.json", {"run": {"a": 1}})
        folder.close()
    assert os.listdir(folder.unfinished) == ["notes.txt"]
    assert len(caplog.messages) == 1
    with Folder(tmp_path / "out", {"a": 1}) as again:  # complete: what is left is looked at again
        assert again.is_complete
    assert os.listdir(folder.unfinished) == ["notes.txt"]


def test_a_folder_that_another_process_completed_before_the_lock_was_free_is_complete(tmp_path, monkeypatch):
    found = []

    def complete_meanwhile(folder, identity):
        found.append(folder)
        if len(found) == 1:
            write_json(folder / "record.json", {"run": identity})
            return False
        return True

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Folder, "check", staticmethod(complete_meanwhile))
    with Folder(tmp_path / "out", {"a": 1}) as folder:
        assert folder.is_complete
    assert not folder.unfinished.exists()


def test_what_a_kill_left_in_a_complete_folder_is_removed(tmp_path):
    (tmp_path / UNFINISHED).mkdir()
    for name in (IDENTITY, LOCK, "00007.residual"):
        (tmp_path / UNFINISHED / name).touch()
    (tmp_path / "record.json").write_text(json.dumps({"run": {"a": 1}}))
    with Folder(tmp_path, {"a": 1}) as folder:
        assert folder.is_complete
    assert os.listdir(tmp_path) == ["record.json"]
