"""Progress lines and requests to stop."""

import signal
from dataclasses import replace
from itertools import pairwise

import pytest

from qsvd.commands.console import Standing, StopRequest, watching

HALF = Standing(
    weights=3, num_weights=8, num_bytes=60_000_000, new_bytes=40_000_000, total_bytes=160_000_000, reduction=13.25
)


def test_a_line_counts_speed_and_time_left_by_this_runs_own_bytes():
    assert HALF.line(4.0) == "3/8 weights, 10 MB/s, 10 s left, error -13.2 %"


def test_a_line_before_any_work_of_this_run_promises_no_time():
    assert replace(HALF, new_bytes=0).line(4.0) == "3/8 weights, 0 MB/s, resumed, error -13.2 %"


def test_an_error_that_grew_has_a_plus():
    assert replace(HALF, reduction=-2.5).line(4.0).endswith("error +2.5 %")


def test_no_reduction_has_no_minus():
    assert replace(HALF, reduction=0.0).line(4.0).endswith("error +0.0 %")


def lines_of_a_run(capsys, num_weights, resumed=0):
    with watching() as show:
        for number in range(1, num_weights + 1):
            num_bytes = number * 10**6
            new_bytes = max(0, number - resumed) * 10**6
            show(Standing(number, num_weights, num_bytes, new_bytes, num_weights * 10**6, 5.0))
    shown = capsys.readouterr()
    assert shown.out == ""
    return [int(line.split("/")[0]) for line in shown.err.splitlines()]


def test_without_a_terminal_there_is_a_line_every_five_percent_and_a_last_one(capsys):
    numbers = lines_of_a_run(capsys, 1000)
    assert len(numbers) in (20, 21)
    assert numbers[0] == 50
    assert numbers[-1] == 1000
    gaps = [later - earlier for earlier, later in pairwise(numbers)]
    assert all(50 <= gap <= 51 for gap in gaps[:-1])  # of 1000 weights; 51 where 0.05 is not met to the last bit
    assert 0 < gaps[-1] <= 51


@pytest.mark.parametrize("num_weights", [1, 7])
def test_few_large_weights_have_a_line_each(capsys, num_weights):
    assert lines_of_a_run(capsys, num_weights) == list(range(1, num_weights + 1))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_request_and_the_second_stops(number, capsys):
    before = signal.getsignal(number)
    with StopRequest("weight") as stop:
        assert not stop.made
        signal.raise_signal(number)
        assert stop.made
        assert capsys.readouterr().err == "stopping after this weight; once more to stop at once\n"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_without_a_signal_nothing_is_asked_and_the_handlers_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopRequest("weight") as stop:
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] != before
    assert not stop.made
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
