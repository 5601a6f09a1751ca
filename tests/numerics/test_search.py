"""The last number that fits, against numbers that are known, and how many are tried."""

import pytest

from qsvd.numerics.search import last_spared, most


@pytest.mark.parametrize("answer", [1, 2, 7, 63, 64])
def test_bisection_finds_the_last_that_fits(answer):
    assert most(1, 64, lambda number: number <= answer) == answer


def test_bisection_finds_nothing_where_the_least_does_not_fit():
    assert most(1, 64, lambda _: False) is None
    assert most(1, 0, lambda _: True) is None


@pytest.mark.parametrize("answer", [1, 2, 7, 1000, 1001, 54321, (1 << 20) - 1, 1 << 20])
@pytest.mark.parametrize("square", [0, 3])
@pytest.mark.parametrize(("step", "jump", "tries"), [(1, 0, 12), (64, 0, 40), (1, 10**9, 40)])
def test_the_last_number_that_leaves_bytes_is_found_with_few_tries(answer, square, step, jump, tries):
    def needed(number):
        return square * number**2 + 7000 * (number // step) * step + (number % step) + jump * (number > 1000)

    def left(number):
        tried.append(number)
        return needed(answer) - needed(number)

    tried = []
    assert last_spared(1 << 20, left) == answer
    assert len(tried) == len(set(tried)) <= tries


def test_nothing_leaves_bytes_where_the_least_number_does_not():
    assert last_spared(64, lambda number: -number) is None
    assert last_spared(1, lambda _: -1) is None
    assert last_spared(0, lambda _: 1) is None
