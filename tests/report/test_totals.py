"""Totals against NumPy and SciPy on the block-diagonal matrix that they stand for."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.linalg import block_diag

from qsvd.records import Norms
from qsvd.report.totals import reduction, relative, totals, worst

ROUNDOFF = 64 * 2.0**-53  # float64 norms of a 35 x 42 matrix, by another route
SILENT = Norms(0.0, 0.0, 0.0, 0.0)


def test_roles_come_in_their_order_and_the_model_last(samples):
    assert [(total.role, total.weights) for total in totals(samples.errors)] == [
        ("q", 2),
        ("down", 2),
        ("other", 1),
        ("model", 5),
    ]


@pytest.mark.parametrize(("role", "members"), [("q", [1, 2]), ("down", [0, 4]), ("other", [3]), ("model", range(5))])
def test_a_total_is_the_norm_of_its_weights_as_diagonal_blocks(samples, role, members):
    total = next(total for total in totals(samples.errors) if total.role == role)
    weight, before, after = (block_diag(*(samples.matrices[i][part] for i in members)) for part in range(3))
    assert total.weight_frobenius == pytest.approx(np.linalg.norm(weight), rel=ROUNDOFF)
    assert relative(total) == pytest.approx(
        [np.linalg.norm(error) / np.linalg.norm(weight) for error in (before, after)], rel=ROUNDOFF
    )
    for norms, error in ((total.before, before), (total.after, after)):
        assert norms.frobenius == pytest.approx(np.linalg.norm(error), rel=ROUNDOFF)
        assert norms.nuclear == pytest.approx(np.linalg.norm(error, "nuc"), rel=ROUNDOFF)
        assert norms.spectral == pytest.approx(np.linalg.norm(error, 2), rel=ROUNDOFF)
    less = reduction(total)
    for order, percent in (("fro", less.frobenius), ("nuc", less.nuclear), (2, less.spectral)):
        expected = 100 - 100 * np.linalg.norm(after, order) / np.linalg.norm(before, order)
        assert percent == pytest.approx(expected, abs=100 * ROUNDOFF)


def test_elements_and_bits_count_every_element_once(samples):
    by_role = {total.role: total for total in totals(samples.errors)}
    assert by_role["q"].elements == 36 + 48
    assert by_role["q"].bits == pytest.approx((36 * 5.25 + 48 * 4.75) / 84, rel=ROUNDOFF)
    assert by_role["model"].elements == 54 + 36 + 48 + 48 + 45
    assert by_role["model"].bits == pytest.approx(
        (54 * 4.5 + 36 * 5.25 + 48 * 4.75 + 48 * 4.125 + 45 * 6) / 231, rel=ROUNDOFF
    )


def test_standard_errors_add_in_squares(samples):
    whole = totals(samples.errors)[-1]
    assert whole.before.nuclear_error == pytest.approx(0.01 * 30**0.5)  # 0 + 1 + 4 + 9 + 16
    assert whole.after.nuclear_error == pytest.approx(0.02 * 30**0.5)


def test_the_standard_error_of_a_sum_is_the_spread_of_sums(samples):
    spread, draws = [0.3, 0.4, 1.2, 0.5, 0.7], 20_000
    errors = [
        replace(error, after=replace(error.after, nuclear_error=sigma))
        for error, sigma in zip(samples.errors, spread, strict=True)
    ]
    sums = np.random.default_rng(0).normal(0, spread, (draws, 5)).sum(axis=1)
    stated = totals(errors)[-1].after.nuclear_error
    assert stated == pytest.approx(sums.std(), rel=5 / (2 * draws) ** 0.5)  # 5 deviations of a standard deviation


def test_the_order_of_the_weights_changes_no_total(samples):
    assert totals(samples.errors[::-1]) == totals(samples.errors)


def test_a_worse_split_is_a_negative_reduction(samples):
    doubled = replace(samples.errors[0], before=Norms(1.0, 2.0, 0.0, 0.5), after=Norms(2.0, 6.0, 0.0, 0.75))
    assert reduction(doubled).frobenius == -100
    assert reduction(doubled).nuclear == -200
    assert reduction(doubled).spectral == -50


def test_a_zero_error_before_has_no_reduction_and_a_zero_weight_no_error(samples):
    exact = replace(samples.errors[0], weight_frobenius=0.0, before=SILENT, after=SILENT)
    assert relative(exact) == (0, 0)
    assert reduction(exact).frobenius == reduction(exact).nuclear == reduction(exact).spectral == 0
    assert relative(replace(exact, after=Norms(1.0, 1.0, 0.0, 1.0))) == (0, float("inf"))


def test_worst_is_by_relative_error_of_the_split_and_equals_by_name(samples):
    by_hand = sorted(
        range(5), key=lambda i: -np.linalg.norm(samples.matrices[i][2]) / np.linalg.norm(samples.matrices[i][0])
    )
    assert worst(samples.errors, 3) == [samples.errors[i] for i in by_hand[:3]]
    assert worst(samples.errors, 0) == []
    assert len(worst(samples.errors, 99)) == 5
    equals = [replace(samples.errors[0], name=name) for name in ("b", "c", "a")]
    assert [error.name for error in worst(equals, 2)] == ["a", "b"]


def refused(sentence):
    return pytest.raises(ValueError, match=f"^{sentence}$")


def test_what_has_no_total_is_refused(samples):
    first, second = samples.errors[:2]
    with refused("no weight was measured, so there is no total"):
        totals([])
    with refused(
        "unknown role neck, tail; a weight's role is one of q, k, v, o, gate, up, down, expert up, expert down, other, "
        "embedding, head"
    ):
        totals([replace(first, role="tail"), replace(second, role="neck")])
    with refused(f"weights measured more than once: {first.name}, {second.name}"):
        totals([first, second, *samples.errors])
    with refused("count -1 is below 0, the least number of weights to list"):
        worst(samples.errors, -1)
