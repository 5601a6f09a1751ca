"""SARA's and PRILoRA's ranks by their definitions, and the highest setting that a budget holds."""

import numpy as np
import pytest

from qsvd.plan.solve import highest_setting, prilora, sara
from tests import reference
from tests.plan.weights import specs


def test_sara_counts_leading_singular_values_whose_sum_stays_below_a_share_of_all():
    matrices = [reference.decaying(40, 60, power=power) for power in (0.2, 0.7, 2.0)]
    spectra = [reference.singular_values(matrix) for matrix in matrices]
    ranks = sara([(values.tolist(), float(values.sum())) for values in spectra])
    for share in (0.0, 0.01, 0.1, 0.3, 0.77):
        by_hand = [int((np.cumsum(values) < share * values.sum()).sum()) for values in spectra]
        assert ranks(share) == by_hand
    assert ranks(0.0) == [0, 0, 0]
    assert len(set(ranks(0.5))) == 3


def test_sara_gives_no_more_than_the_values_it_knows():
    assert sara([([5.0, 4.0], 100.0)])(0.9) == [2]


def test_prilora_rises_in_a_line_from_a_rank_to_three_times_that():
    weights = specs(layers=5)
    ranks = prilora(weights, [100] * len(weights))
    by_layer = [round(4 + (12 - 4) * layer / 4) for layer in range(5)]
    assert ranks(4.0) == [rank for rank in by_layer for _ in range(3)]
    assert prilora(weights, [7] * len(weights))(4.0)[-1] == 7


def test_prilora_of_one_layer():
    assert prilora(specs(layers=1), [100] * 3)(4.0) == [4, 4, 4]


@pytest.mark.parametrize("budget", [0, 1, 17, 3_001, 5_999, 6_000, 10_000])
def test_the_next_rank_above_the_highest_setting_is_too_much(budget):
    settings = np.sort(np.random.default_rng(0).uniform(0, 1, 3_000))  # at each of which one more rank comes

    def rank(setting):
        return int((settings <= setting).sum())

    found = highest_setting(1.0, lambda setting: 2 * rank(setting), budget)
    assert rank(found) == min(budget // 2, 3_000)


def test_nothing_is_found_if_the_least_is_too_much():
    assert highest_setting(1.0, lambda _: 5, 4) is None
