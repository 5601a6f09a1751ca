"""Progress of a training run."""

from itertools import pairwise

import pytest

from qsvd.commands.console import line, watching_steps
from qsvd.training.steps import Step


def step(number):
    """A step of two seconds and a hundred tokens."""
    return Step(number, 1 / 3, 0.5, 1e-4, 100 * number, 2.0 * number, 1_230_000_000)


def test_a_line_has_the_loss_the_speed_the_time_left_and_the_peak():
    assert line(step(5), 20, None) == "step 5/20, loss 0.3333, 50 tokens/s, 30 s left, peak 1.23 GB"


def test_the_speed_of_a_resumed_run_is_its_own():
    slow = Step(10, 1.0, 0.5, 1e-4, 1000, 1000.0, 0)
    now = Step(15, 1 / 3, 0.5, 1e-4, 1500, 1010.0, 1_230_000_000)
    assert line(now, 20, slow) == "step 15/20, loss 0.3333, 50 tokens/s, 10 s left, peak 1.23 GB"


def test_a_step_that_took_no_time_divides_by_nothing():
    assert line(Step(1, 1.0, 0.5, 0.0, 0, 0.0, 0), 1, None).startswith("step 1/1, loss 1.0000, 0 tokens/s, 0 s left")


def lines_of_a_run(capsys, total, first=1):
    with watching_steps(total, None) as show:
        for number in range(first, total + 1):
            show(step(number))
    shown = capsys.readouterr()
    assert shown.out == ""
    return [int(text.removeprefix("step ").split("/")[0]) for text in shown.err.splitlines()]


def test_without_a_terminal_there_is_a_first_line_one_every_five_percent_and_a_last_one(capsys):
    numbers = lines_of_a_run(capsys, 1000)
    assert (numbers[0], numbers[-1]) == (1, 1000)
    gaps = [later - earlier for earlier, later in pairwise(numbers)]
    assert all(50 <= gap <= 51 for gap in gaps[:-1])  # of 1000 steps; 51 where 0.05 is not met to the last bit
    assert 0 < gaps[-1] <= 51


def test_few_steps_have_a_line_each(capsys):
    assert lines_of_a_run(capsys, 7) == list(range(1, 8))


def test_a_resumed_run_begins_with_a_line(capsys):
    assert lines_of_a_run(capsys, 1000, first=903)[0] == 903


@pytest.mark.parametrize("before", [None, step(3)])
def test_a_terminal_gets_a_bar(before, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with watching_steps(10, before) as show:
        show(step(10))
    shown = capsys.readouterr().err
    assert "step 10/10, loss 0.3333" in shown
