"""Statistics of a comparison, by SciPy's other functions, by definition and by simulation."""

import numpy as np
import pytest
from scipy import stats

from qsvd.report.comparison.results import Rate, RowResult, Seed, detectable, with_statistics
from qsvd.report.comparison.table import comparison_table


def row(number, losses, note=""):
    seeds = tuple(Seed(seed, loss, None, 1.0, "NaN" if loss is None else None) for seed, loss in enumerate(losses))
    rates = (Rate(1e-3, 1.0, None),)
    return RowResult(number, f"m{number}", "--rank 0", 4, 0, 100, 90, 1000, note, rates, 1e-3, seeds)


def test_means_deviations_and_paired_tests_are_those_of_scipy():
    losses = np.random.default_rng(0).normal(3.0, 0.1, (4, 5))
    rows = with_statistics([row(number, values.tolist()) for number, values in enumerate(losses, 1)])
    tests = [stats.ttest_1samp(values - losses[0], 0.0) for values in losses[1:]]
    assert rows[0].paired is None
    for found, values, test in zip(rows[1:], losses[1:], tests, strict=True):
        assert found.test_loss == pytest.approx(values.mean())
        assert found.test_loss_deviation == pytest.approx(values.std(ddof=1))
        assert found.paired.n == 5
        assert found.paired.difference == pytest.approx((values - losses[0]).mean())
        assert found.paired.p == pytest.approx(test.pvalue)
        assert (found.paired.low, found.paired.high) == pytest.approx(tuple(test.confidence_interval(0.95)))
    p = np.array([test.pvalue for test in tests])
    order = np.argsort(p)
    holm = np.minimum(1, np.maximum.accumulate(p[order] * np.array([3, 2, 1])))
    assert [rows[1 + place].paired.p_holm for place in order] == pytest.approx(holm.tolist())


def test_only_seeds_that_both_rows_have_are_paired_and_equal_differences_have_no_p():
    first, other, few = with_statistics([row(1, [1.0, 2.0, None]), row(2, [1.5, 2.5, 9.0]), row(3, [None, 2.0, 1.0])])
    assert first.test_loss == 1.5
    assert (other.paired.n, other.paired.difference, other.paired.p) == (2, 0.5, None)
    assert few.paired is None


@pytest.mark.parametrize("n", [2, 8])
def test_a_detectable_difference_is_found_in_four_of_five_cases(n):
    generator = np.random.default_rng(1)
    differences = generator.normal(detectable(n) / np.sqrt(n), 1.0, (40_000, n))
    share = np.mean(stats.ttest_1samp(differences, 0.0, axis=1).pvalue < 0.05)
    assert share == pytest.approx(0.8, abs=4 * np.sqrt(0.8 * 0.2 / 40_000))


def test_the_table_says_what_is_not_tuned_and_how_weak_a_test_of_few_seeds_is():
    rows = with_statistics([row(1, [1.0, 2.0, 1.5]), row(2, [1.1, 2.3, 1.6], "not tuned")])
    head = {"model": "M", "command": "qsvd compare", "seeds": 3, "size": 4, "equal": "rank"}
    text = comparison_table(head, rows, [{"method": "lora-ga", "split": "", "reason": "no file"}], [])
    assert "| m2 (**not tuned**) |" in text
    assert "**not tuned** marks rows" in text
    assert "With 3 seeds the test is weak" in text
    assert "5.7 standard errors" in text
    assert "| lora-ga |  | no file |" in text
