"""Progress, and requests to stop."""

import signal
import time
from itertools import pairwise

import pytest
from rich.table import Table
from rich.text import Text

from qsvd.console.journal import progress_of
from qsvd.console.progress import StopRequest, Stopwatch, display, say, terminal, watched
from qsvd.errors import Interrupted
from qsvd.records import Progress
from qsvd.training.run_folder import Step


def at(number, total, *, new=None):
    return Progress(number, number if new is None else new, total, f"{number}/{total} weights", ("MB/s", 1e6))


def test_a_line_counts_speed_and_time_left_by_this_runs_own_work():
    half = Progress(60e6, 40e6, 160e6, "3/8 weights", ("MB/s", 1e6), "error -13.2 %")
    assert half.line(4.0) == "3/8 weights, 10 MB/s, 10 s left, error -13.2 %"
    assert Progress(600, 200, 1000, "5/9 weights measured").line(10.0) == "5/9 weights measured, 20 s left"


def test_a_line_before_any_work_of_this_run_promises_no_time():
    assert at(3, 8, new=0).line(4.0) == "3/8 weights, 0 MB/s, resumed"


def test_where_the_time_went_adds_up_to_all_of_it(monkeypatch):
    clock = iter([0.0, 1.0, 4.0, 10.0, 30.25, 31.0, 33.5, 100.0])  # begun; reading, writing, reading; the line
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    times = Stopwatch("splitting")
    for what in ("reading", "writing", "reading"):
        with times.waiting(what):
            pass
    assert times.line() == "Time: 74 s splitting, 20 s waiting for writing, 5.5 s waiting for reading"


def step(number):
    """A step of two seconds and a hundred tokens."""
    return Step(number, 1 / 3, 0.5, 1e-4, 100 * number, 2.0 * number, 1_230_000_000)


def test_the_line_of_a_step_has_the_loss_the_speed_the_time_left_and_the_peak():
    line = "step 5/20, loss 0.3333, 50 tokens/s, 30 s left, peak 1.23 GB"
    assert progress_of(step(5), 20, None).line(0.0) == line


def test_the_speed_of_a_resumed_run_is_its_own():
    slow = Step(10, 1.0, 0.5, 1e-4, 1000, 1000.0, 0)
    now = Step(15, 1 / 3, 0.5, 1e-4, 1500, 1010.0, 1_230_000_000)
    line = "step 15/20, loss 0.3333, 50 tokens/s, 10 s left, peak 1.23 GB"
    assert progress_of(now, 20, slow).line(0.0) == line


def test_a_step_that_took_no_time_divides_by_nothing():
    line = progress_of(Step(1, 1.0, 0.5, 0.0, 0, 0.0, 0), 1, None).line(0.0)
    assert line.startswith("step 1/1, loss 1.0000, 0 tokens/s, 0 s left")


def lines_of_a_run(capsys, total, first=1):
    with display() as show:
        for number in range(first, total + 1):
            show(at(number, total))
    shown = capsys.readouterr()
    assert shown.out == ""
    return [int(line.split("/")[0]) for line in shown.err.splitlines()]


@pytest.mark.parametrize("first", [1, 903])
def test_without_a_terminal_there_are_two_first_lines_one_every_five_percent_and_a_last_one(capsys, first):
    numbers = lines_of_a_run(capsys, 1000, first)
    assert (numbers[:2], numbers[-1]) == ([first, first + 1], 1000)
    gaps = [later - earlier for earlier, later in pairwise(numbers[1:])]
    assert all(50 <= gap <= 51 for gap in gaps[:-1])  # of 1000 weights; 51 where 0.05 is not met to the last bit
    assert 0 < gaps[-1] <= 51


@pytest.mark.parametrize("total", [1, 7])
def test_few_large_weights_have_a_line_each(capsys, total):
    assert lines_of_a_run(capsys, total) == list(range(1, total + 1))


def test_the_first_line_tells_no_time_since_what_came_before_it_says_nothing_of_the_speed(capsys, monkeypatch):
    clock = iter([0.0, 100.0, 102.0, 104.0])
    monkeypatch.setattr("qsvd.console.progress.time.monotonic", lambda: next(clock))
    with display() as show:
        for number in (1, 2, 3):
            show(Progress(number, number, 5, f"{number}/5 weights", ("weights/s", 1)))
    assert capsys.readouterr().err.splitlines() == [
        "1/5 weights",
        "2/5 weights, 0.5 weights/s, 6 s left",
        "3/5 weights, 0.5 weights/s, 4 s left",
    ]


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with display() as show:
        show(at(10, 10))
    assert "10/10 weights" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_request_and_the_second_stops(number, capsys):
    before = signal.getsignal(number)
    with StopRequest("weight") as stop:
        assert not stop.made
        signal.raise_signal(number)
        assert stop.made
        assert capsys.readouterr().err == "stopping after this weight; press Ctrl-C again to stop at once\n"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_without_a_signal_nothing_is_asked_and_the_handlers_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopRequest("weight") as stop:
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] != before
    assert not stop.made
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_watched_run_stops_where_nothing_is_lost():
    with watched("weight", "all is kept") as show:
        show(at(1, 9))
        signal.raise_signal(signal.SIGINT)
        show(Progress(2, 2, 9, "2/9 weights", may_stop=False))
        with pytest.raises(Interrupted, match=r"^interrupted; all is kept$"):
            show(at(3, 9))


def test_text_is_shown_as_it_is(capsys):
    table = Table(title="[i]a[/b]")
    table.add_column("path")
    table.add_row("runs[/b]/:cat:")
    terminal().print(table)
    shown = capsys.readouterr().out
    assert "runs[/b]/:cat:" in shown
    assert "[i]a[/b]" in shown


STEERS = "a\x1b[31m\r\x07\x9b2J\u202eb"
ESCAPED = r"a\x1b[31m\r\x07\x9b2J\u202eb"


def test_nothing_from_outside_steers_a_terminal(capsys):
    table = Table(title=STEERS)
    table.add_column(STEERS)
    table.add_row(STEERS)
    terminal().print(table, Text(STEERS), STEERS)  # rich leaves out some signs of a Text
    say(STEERS)
    with display() as show:
        show(Progress(1, 1, 1, STEERS))
    shown = capsys.readouterr()
    assert shown.out.count(ESCAPED) == 5
    assert ESCAPED in shown.err
    assert [one for one in shown.out + shown.err if not one.isprintable() and one != "\n"] == []


def test_a_terminal_with_colours_gets_those_of_the_table_only(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with (console := terminal()).capture() as captured:
        console.print(STEERS, style="red", highlight=False)
    assert captured.get() == f"\x1b[31m{ESCAPED}\x1b[0m\n"
