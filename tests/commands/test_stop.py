"""A run that is asked to stop, or that fails half-way, keeps what is finished and goes on there."""

import errno
import os
import signal
from pathlib import Path

import pytest

import qsvd
import qsvd.files.quantize_folder
import qsvd.prepare.quantize
from qsvd.cli import run
from qsvd.decompose.alternate import split_weights
from tests.checkpoints import write_checkpoint
from tests.commands.folders import files_of


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    write_checkpoint(folder, vocab_size=1024, max_shard_size="100KB")
    return folder


ARGUMENTS = ("quantize", "--out", "out", "--rank", "4", "--iterations", "1", "--shard-size", "100KB")


@pytest.fixture(scope="module")
def roomy(source, tmp_path_factory):
    """A command, and every file that it writes where the disk has room."""
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path_factory.mktemp("roomy"))
        arguments = [*ARGUMENTS, str(source)]
        assert run(arguments) == 0
        return arguments, files_of(Path.cwd())


def interrupting(monkeypatch, *numbers):
    """Send SIGINT while the weights of these numbers, counted from 1, are being split; returns what was begun."""
    begun = []

    def interrupted_split(*arguments, **options):
        begun.append(arguments[0].shape)
        for _ in range(numbers.count(len(begun))):
            signal.raise_signal(signal.SIGINT)
        return split_weights(*arguments, **options)

    monkeypatch.setattr(qsvd.prepare.quantize, "split_weights", interrupted_split)
    return begun


def test_the_first_interrupt_finishes_the_weight_at_hand(source, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    begun = interrupting(monkeypatch, 3)
    assert run(["quantize", str(source), "--out", str(out), "--rank", "4", "--iterations", "1"]) == 130
    assert "finished work is kept, the same command continues in" in capsys.readouterr().err
    assert len(begun) == len(list((out / "unfinished").glob("*.factors"))) == 3
    monkeypatch.undo()
    begun = interrupting(monkeypatch)
    assert run(["quantize", str(source), "--out", str(out), "--rank", "4", "--iterations", "1"]) == 0
    assert len(begun) == 14 - 3
    assert "14/14 weights" in capsys.readouterr().err


def test_the_second_interrupt_stops_at_once(source, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    begun = interrupting(monkeypatch, 2, 2)
    before = signal.getsignal(signal.SIGINT)
    assert run(["quantize", str(source), "--out", str(out), "--rank", "4", "--iterations", "1"]) == 130
    assert capsys.readouterr().err.endswith("qsvd: interrupted\n")
    assert len(begun) == 2
    assert len(list((out / "unfinished").glob("*.factors"))) == 1
    assert signal.getsignal(signal.SIGINT) is before


def test_an_error_that_is_still_held_does_not_keep_the_folder_locked(source, tmp_path, monkeypatch):
    options = qsvd.Quantize(str(source), out=tmp_path / "out", rank=4, iterations=1)

    def fail(*_arguments, **_options):
        raise OSError("the disk went away")

    monkeypatch.setattr(qsvd.prepare.quantize, "split_weights", fail)
    with pytest.raises(OSError, match="the disk went away") as held:  # as sys.last_traceback holds it in a notebook
        qsvd.quantize(options)
    monkeypatch.undo()
    qsvd.quantize(options)
    assert held.traceback


@pytest.mark.parametrize(
    ("name", "finished"),
    [  # a part of a file, and how many weights come before; None: the next ones are split while a shard is written
        ("00000.residual", 5),
        ("00000.factors", 5),
        ("00004.residual", 1),
        ("model-", None),
        ("adapter_model", 14),
    ],
)
def test_a_disk_that_fills_up_is_one_sentence_and_the_same_command_goes_on(
    roomy, tmp_path, monkeypatch, capsys, name, finished
):
    arguments, files = roomy
    write_stream = qsvd.files.quantize_folder.write_stream

    def until_full(path, tensors, metadata):
        if path.name.startswith(name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_stream(path, tensors, metadata)

    capsys.readouterr()  # of the folder that the others are compared with
    (tmp_path / "full").mkdir()
    monkeypatch.chdir(tmp_path / "full")
    monkeypatch.setattr(qsvd.files.quantize_folder, "write_stream", until_full)
    assert run(arguments) == 1
    *_, sentence = capsys.readouterr().err.splitlines()
    assert sentence == "qsvd: No space left on device; finished work is kept, the same command continues in out"
    kept = len(list(Path("out/unfinished").glob("*.factors")))
    assert finished in (kept, None)
    monkeypatch.setattr(qsvd.files.quantize_folder, "write_stream", write_stream)
    begun = interrupting(monkeypatch)
    assert run(arguments) == 0
    assert len(begun) == 14 - kept
    assert files_of(tmp_path / "full") == files


def test_weights_that_are_finished_are_not_split_again(source, tmp_path, monkeypatch):
    options = qsvd.Quantize(str(source), out=tmp_path / "out", rank=4, iterations=1)
    qsvd.quantize(options)
    begun = interrupting(monkeypatch)
    qsvd.quantize(options)
    assert begun == []
