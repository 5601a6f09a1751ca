"""The interval of a share against SciPy's."""

import pytest
from scipy.stats import binomtest

from qsvd.evaluate.accuracy import wilson_interval


@pytest.mark.parametrize(("count", "total"), [(0, 1), (1, 1), (0, 20), (20, 20), (1, 2), (437, 872), (1319, 1319)])
def test_the_interval_is_wilsons(count, total):
    expected = binomtest(count, total).proportion_ci(0.95, method="wilson")
    assert wilson_interval(count, total) == pytest.approx((expected.low, expected.high), rel=1e-12, abs=1e-15)
    assert 0 <= wilson_interval(count, total)[0] <= wilson_interval(count, total)[1] <= 1


def test_none_and_all_reach_the_ends_and_stay_within_them():
    for total in range(1, 200):
        assert 0 <= wilson_interval(0, total)[0] < 1e-15
        assert 1 - 1e-15 < wilson_interval(total, total)[1] <= 1
