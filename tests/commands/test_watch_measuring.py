"""Progress of measuring in words."""

from itertools import pairwise

import pytest

from qsvd.commands.console import watching
from qsvd.prepare.allocate import Progressed


def test_the_time_that_is_left_is_at_the_speed_of_this_run_alone():
    done = Progressed(weights=5, num_weights=9, elements=600, new_elements=200, total_elements=1000)
    assert done.line(10.0) == "5/9 weights measured, 20 s left"


def test_nothing_new_has_no_speed():
    assert Progressed(5, 9, 600, 0, 1000).line(10.0) == "5/9 weights measured, resumed"


@pytest.mark.parametrize("is_terminal", [False, True])
def test_lines_come_every_few_percent_and_at_the_end(capsys, monkeypatch, is_terminal):
    monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal, raising=False)
    with watching() as show:
        for number in range(1, 101):
            show(Progressed(number, 100, 10 * number, 10 * number, 1000))
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "100/100 weights measured, 0 s left" in shown.err
    if not is_terminal:
        numbers = [int(line.split("/")[0]) for line in shown.err.splitlines()]
        assert numbers[-1] == 100
        assert {later - earlier for earlier, later in pairwise([0, *numbers])} <= {4, 5, 6}  # 0.15 - 0.1 is below 0.05
