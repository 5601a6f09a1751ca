"""The sweep of learning rates: where it begins, when it grows, and what it chooses."""

import math
from itertools import pairwise

import pytest

from qsvd.training.rates import GRID, best_rate, first_rates, next_rates


def swept(loss, first, *, grows=True):
    """All losses by rate, of a sweep of a function."""
    losses = {}
    while needed := next_rates(first, losses, grows=grows):
        assert not {*needed} & losses.keys()
        losses |= {rate: loss(rate) for rate in needed}
    return losses


def test_the_grid_is_half_decades_and_a_sweep_begins_around_a_rate():
    steps = [math.log10(after / before) for before, after in pairwise(GRID)]
    assert all(0.47 < step < 0.53 for step in steps)
    assert first_rates(2e-3) == (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    assert first_rates(1e-9) == GRID[:5]
    assert first_rates(1e9) == GRID[-5:]


@pytest.mark.parametrize("best", [1e-6, 3e-4, 1e-3, 1e-2, 1.0])
def test_a_sweep_grows_until_the_best_rate_is_between_two_others(best):
    first = first_rates(1e-3)
    losses = swept(lambda rate: abs(math.log(rate / best)), first)
    assert best_rate(losses) == best
    assert min(losses) < best < max(losses)
    assert {*first} <= losses.keys()
    inside = {rate for rate in GRID if min(best / 3.4, min(first)) <= rate <= max(best * 3.4, max(first))}
    assert losses.keys() == inside


def test_diverged_rates_are_never_chosen_and_a_sweep_of_them_goes_down():
    losses = swept(lambda rate: rate if rate < 1e-5 else None, first_rates(1e-2))
    assert best_rate(losses) == GRID[0]
    assert swept({}.get, first_rates(1e-2)).keys() == {rate for rate in GRID if rate <= 1e-1}
    assert best_rate({1e-3: None, 1e-2: math.inf}) is None
    assert best_rate({1e-2: 1.0, 1e-3: 1.0}) == 1e-3


def test_rates_that_are_given_are_all_that_is_tried():
    assert swept(lambda rate: rate, (1e-3, 1e-2), grows=False) == {1e-3: 1e-3, 1e-2: 1e-2}
