"""A run that dies at any moment goes on where it stopped, to the same bytes as one that was left alone."""

import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import qsvd
from qsvd.cli import main, run
from tests.checkpoints import write_checkpoint
from tests.commands.folders import files_of, shared_model

FORK = multiprocessing.get_context("fork")
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
EXIT = 9
SOME = "*.layer.0.*"  # 6 of 36 weights


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    write_checkpoint(folder, vocab_size=1024, max_shard_size="100KB")
    return folder


@pytest.fixture(scope="module")
def tiny(source, tmp_path_factory):
    """Options of a run with two weights and two shards, in a folder that is not there yet."""
    out = tmp_path_factory.mktemp("runs") / "out"
    return qsvd.Quantize(
        str(source), out=out, rank=4, iterations=1, include=("*.0.self_attn.[qk]_proj",), shard_size="400KB"
    )


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    """Every file of the run when nobody disturbs it, and what was in its folder right before each of its changes."""
    moments, count = tmp_path_factory.mktemp("moments"), multiprocessing.Value("i")

    def keep(number):
        count.value = number
        while tiny.out.exists():
            try:
                shutil.copytree(tiny.out, moments / str(number))
                return
            except OSError:  # the change before was made by another thread meanwhile
                shutil.rmtree(moments / str(number), ignore_errors=True)

    assert forked(tiny, keep) == 0
    files = files_of(tiny.out)
    assert len([name for name in files if name.endswith(".safetensors")]) == 3  # two shards and the adapter
    return files, [moments / str(number) for number in range(1, count.value + 1)]


def forked(options, before_change):
    """The exit code of a forked process that quantizes, and calls a function before every change of the disk."""
    process = FORK.Process(target=_quantize, args=(options, before_change))
    process.start()
    process.join(timeout=600)
    return process.exitcode


def die_at(options, number):
    """Run in a forked process that is gone, without any clean-up, right before its so-manieth change of `out`."""
    return forked(options, lambda count: os._exit(EXIT) if count == number else None)


def _quantize(options, before_change):
    count, is_called, one = 0, False, threading.RLock()

    def watch(event, arguments):
        nonlocal count, is_called
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        path = str(arguments[0]) if arguments else ""
        is_change = (event in CHANGES or writes) and not path.startswith(("/dev", "/proc"))
        if not is_change or "torchinductor" in path:
            return
        with one:  # files are written in threads
            if is_called:
                return  # what the function itself changes does not count
            count, is_called = count + 1, True
            before_change(count)
            is_called = False

    sys.addaudithook(watch)
    qsvd.quantize(options)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # Python 3.12; the child has one
def test_death_before_any_change_of_the_disk_costs_nothing(tiny, undisturbed):
    files, moments = undisturbed
    wrong, seen = {}, []
    for moment in moments:
        if (content := files_of(moment)) in seen:
            continue  # the change before was outside of the folder, or no change
        seen.append(content)
        shutil.rmtree(tiny.out, ignore_errors=True)
        if moment.exists():
            moment.rename(tiny.out)
        try:
            qsvd.quantize(tiny)
        except (ValueError, OSError) as error:
            wrong[moment.name] = str(error)
            continue
        if files_of(tiny.out) != files:
            wrong[moment.name] = "other bytes"
    assert not wrong, f"of {len(moments)} changes"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_run_that_dies_again_and_again_still_ends_in_the_same_bytes(tiny, undisturbed):
    files, moments = undisturbed
    draws = random.Random(3)
    shutil.rmtree(tiny.out)
    deaths = 0
    while die_at(tiny, draws.randrange(5, len(moments) - 15)) == EXIT and deaths < 20:
        deaths += 1
    assert deaths > 2
    assert files_of(tiny.out) == files


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_kill_at_a_random_moment_of_a_real_run(tmp_path, monkeypatch):
    """The moment is a number of finished weights, of 6, and some milliseconds more."""
    options = {"rank": 16, "iterations": 1, "shard_size": "5MB", "out": Path("out"), "include": (SOME,)}
    asked = qsvd.Quantize(str(shared_model("minilm-l6").resolve()), **options)

    def quantize_in(folder):
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        return qsvd.quantize(asked)

    alone = files_of(quantize_in(tmp_path / "alone"))
    draws = random.Random(11)
    weights, folder = draws.randrange(4), tmp_path / "killed"
    process = FORK.Process(target=quantize_in, args=(folder,))
    process.start()
    unfinished = folder / "out" / "unfinished"
    while not (unfinished / "run.json").exists() or len(list(unfinished.glob("*.factors"))) < weights:
        assert process.is_alive()
        time.sleep(0.001)
    time.sleep(draws.uniform(0, 0.02))
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert files_of(quantize_in(folder)) == alone


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_an_interrupted_process_ends_with_130_and_the_same_command_goes_on(tmp_path, monkeypatch, capsys):
    source = shared_model("minilm-l6").resolve()
    arguments = ("quantize", source, "--out", "out", "--rank", "16", "--iterations", "1", "--include", SOME)
    unfinished = tmp_path / "out" / "unfinished"
    said, noted = tmp_path / "stdout", tmp_path / "stderr"

    def work():
        torch.set_num_threads(torch.get_num_threads())  # else threads of the work make torch's pool anew, at once
        with said.open("w") as sys.stdout, noted.open("w") as sys.stderr:
            main([str(argument) for argument in arguments])

    monkeypatch.chdir(tmp_path)
    process = FORK.Process(target=work)
    process.start()
    end = time.monotonic() + 600
    while not any(unfinished.glob("*.factors")):
        assert process.is_alive(), noted.read_text()
        assert time.monotonic() < end
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGINT)
    process.join(timeout=600)
    out, err = said.read_text(), noted.read_text()
    kept = {path: path.stat().st_mtime_ns for path in unfinished.glob("*.factors")}
    assert process.exitcode == 130
    assert out == ""
    assert "stopping after this weight; press Ctrl-C again to stop at once" in err
    assert err.endswith("qsvd: interrupted; finished work is kept, the same command continues in out\n")
    assert 0 < len(kept) < 6
    assert run([str(argument) for argument in arguments]) == 0
    shown = capsys.readouterr()
    assert "6/6 weights" in shown.err
    assert shown.out.endswith("\nout\n")
    assert not unfinished.exists()
