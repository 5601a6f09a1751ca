"""A run of `qsvd calibrate` that dies or is stopped goes on to the same bytes; a complete one stays as it is."""

import multiprocessing
import os
import re
import signal
import sys
from contextlib import contextmanager
from dataclasses import replace

import pytest

from qsvd.cli import run
from qsvd.commands import calibrate as command
from qsvd.commands.calibrate import calibrate, measure
from qsvd.console import progress as console
from qsvd.errors import BadInput
from qsvd.prepare.calibrate import prepare_calibrate
from qsvd.records import show_nothing
from tests.commands.calibrations import TEXTS, options_of, write_rows
from tests.commands.folders import without_progress
from tests.stops import StopAfter, Stopped

EXIT = 9
BLOCKS = 2  # of the model


def die_at(options, number, changes=None):
    """Run in a forked process that is gone, without any clean-up, right before its so-manieth rename."""
    process = multiprocessing.get_context("fork").Process(target=_calibrate, args=(options, number, changes))
    process.start()
    process.join(timeout=600)
    return process.exitcode


def _calibrate(options, number, changes):
    count = 0

    def watch(event, _arguments):
        nonlocal count
        if event == "os.rename":
            count += 1
            if changes is not None:
                changes.value = count
            if count == number:
                os._exit(EXIT)

    sys.addaudithook(watch)
    calibrate(options)


def test_a_run_that_dies_before_any_rename_goes_on_to_the_same_bytes(stories, texts, tmp_path):
    """Also with other chunks than before, which are no part of the result."""
    changes = multiprocessing.Value("i")
    asked = {"traces": 1, "examples": 2}
    whole = options_of(stories, texts, tmp_path / "whole", chunk=1, **asked)
    assert die_at(whole, None, changes) == 0
    assert changes.value == 3  # two chunks, the result
    for number in range(1, 4):
        out = tmp_path / f"dies-{number}"
        assert die_at(options_of(stories, texts, out, chunk=1, **asked), number) == EXIT
        assert not out.exists()
        assert out.with_name(f"{out.name}.unfinished").exists() == (number > 1)
        calibrate(options_of(stories, texts, out, chunk=1 if number % 2 else 2, **asked))
        assert out.read_bytes() == whole.out.read_bytes()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"whole", *(f"dies-{number}" for number in range(1, 4))}


def test_what_is_kept_is_not_done_again(stories, texts, tmp_path):
    options = options_of(stories, texts, tmp_path / "s", chunk=1)
    steps = 2 * BLOCKS + 1  # the blocks, up and down, and the end of a chunk
    with pytest.raises(Stopped):
        measure(prepare_calibrate(options), StopAfter(3 * steps))
    show = StopAfter()
    measure(prepare_calibrate(options), show)
    assert min(now.share for now in show.seen) > 3 / 4
    assert [now.done for now in show.seen if now.may_stop] == [4]
    assert len(show.seen) == steps


def test_with_gradients_a_run_goes_on_with_the_next_block_of_the_backward_pass_to_the_same_bytes(
    stories, texts, tmp_path
):
    changes = {"traces": 1, "gradient_rank": 4}
    whole = options_of(stories, texts, tmp_path / "whole", **changes)
    calibrate(whole)
    for number in (2, 3):  # two blocks, the result
        options = options_of(stories, texts, tmp_path / f"dies-{number}", **changes)
        assert die_at(options, number) == EXIT
        show = StopAfter()
        measure(prepare_calibrate(options), show)
        done = number - 1
        assert len(show.seen) == BLOCKS - done + max(BLOCKS - done - bool(done), 0)
        assert options.out.read_bytes() == whole.out.read_bytes()
    assert len(list(tmp_path.iterdir())) == 3


def test_hidden_states_of_all_examples_that_do_not_fit_are_refused_before_the_work(
    stories, texts, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(command, "free_host_memory", lambda: 10**4)
    monkeypatch.setattr(command, "add_examples", None)
    flags = ["--examples", "4", "--device", "cpu", "--gradient-rank", "4"]
    assert run(["calibrate", str(stories), str(texts), "--out", str(tmp_path / "s"), *flags]) == 3
    sentence = r"--gradient-rank keeps the hidden states of all 4 examples, 0\.\d GB, and 0\.0 GB are half of the free"
    assert re.search(sentence, capsys.readouterr().err)
    assert run(["calibrate", str(stories), str(texts), "--out", str(tmp_path / "s"), *flags, "--chunk", "2"]) == 2
    assert "--chunk divides the examples, and --gradient-rank sums over all" in capsys.readouterr().err


def test_ctrl_c_ends_after_the_chunk_and_says_what_stays(stories, texts, tmp_path, capsys, monkeypatch):
    stopped = []

    @contextmanager
    def once():
        def show(_position):
            if not stopped:
                stopped.append(True)
                os.kill(os.getpid(), signal.SIGINT)

        yield show

    monkeypatch.setattr(console, "display", once)
    out = tmp_path / "s"
    assert run(["calibrate", str(stories), str(texts), "--out", str(out), "--examples", "4", "--chunk", "2"]) == 130
    stopping, sentence = capsys.readouterr().err.splitlines()
    assert stopping == "stopping after this chunk of examples; press Ctrl-C again to stop at once"
    assert sentence == f"qsvd: interrupted; finished examples are kept, the same command continues for {out}"
    show = StopAfter()
    measure(prepare_calibrate(options_of(stories, texts, out)), show)
    assert "2/4 examples kept" in show.seen[0].what
    assert out.is_file()


def test_a_complete_file_stays_as_it_is(stories, texts, tmp_path, capsys):
    out = tmp_path / "s"
    flags = ["calibrate", str(stories), str(texts), "--out", str(out), "--examples", "2", "--device", "cpu"]
    assert run(flags) == 0
    before, stamp = out.read_bytes(), out.stat().st_mtime_ns
    capsys.readouterr()
    assert run(flags) == 0
    shown = capsys.readouterr()
    assert (shown.out, without_progress(shown.err)) == (f"{out}\n", f"{out} was complete already\n")
    assert (out.read_bytes(), out.stat().st_mtime_ns) == (before, stamp)
    for name, there, now in (("seed", "0", "1"), ("traces", "0", "3"), ("dtype", '"float32"', '"bfloat16"')):
        assert run([*flags, f"--{name}", now.strip('"')]) == 2
        assert f"s was written with other options: {name} {there} there, {now} now" in capsys.readouterr().err
    others = write_rows(tmp_path / "t.jsonl", [{"text": text.upper()} for text in TEXTS])
    assert run([*flags[:2], str(others), *flags[3:]]) == 2
    assert "s was written with other options: the examples as tokens changed" in capsys.readouterr().err


def test_without_a_chunk_asked_for_few_examples_can_be_lost(stories, texts, tmp_path, monkeypatch):
    whole = calibrate(options_of(stories, texts, tmp_path / "whole"))
    monkeypatch.setattr(command, "MOST_CHUNK", 3)
    options = options_of(stories, texts, tmp_path / "s")
    show = StopAfter()
    measure(prepare_calibrate(options), show)
    assert [now.done for now in show.seen if now.may_stop] == [3, 4]
    assert options.out.read_bytes() == whole.read_bytes()


def test_two_processes_do_not_measure_one_file_and_a_file_that_came_meanwhile_is_kept(stories, texts, tmp_path):
    options = options_of(stories, texts, tmp_path / "st", examples=2)
    first, other = prepare_calibrate(options), prepare_calibrate(replace(options, seed=5))

    def meanwhile(_progress):
        with pytest.raises(BadInput, match=r"another qsvd process is writing to .*st; wait for it, or stop it"):
            measure(other, show_nothing)

    measure(first, meanwhile)
    before = (tmp_path / "st").read_bytes()
    with pytest.raises(BadInput, match=r"st was written with other options: .*seed 0 there, 5 now"):
        measure(other, show_nothing)
    assert (tmp_path / "st").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["st"]
