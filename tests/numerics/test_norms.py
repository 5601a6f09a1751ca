"""Norms of error matrices against SciPy's singular values in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qsvd.numerics import norms as error
from qsvd.numerics.norms import frobenius, norms
from qsvd.records import Norms
from tests import reference

UNIT = 2.0**-24  # float32 rounds within this, relatively
ROUNDOFF = 40 * UNIT  # of a float32 sum or product of a few hundred to a few thousand terms
ROOT = 2.0**-26 * 8  # of the largest singular value: the square root of an eigenvalue that is off by a few 2^-53
DOUBLE = 2.0**-53 * 4096  # relative, of float64 sums of squares
RITZ = 1e-3  # how far the largest Ritz value of 16 steps or more lay below the largest singular value of noise, doubled
WITHIN = 0.02  # what the report promises of an estimated nuclear norm
STATED = 0.0095  # largest standard error here, relative: enough is 0.006, but 256 probes of a steep spectrum give 0.008


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def nf4_error(rows, columns, seed):
    """What NF4 leaves of a matrix whose columns shrink as k^-0.7, the outliers of heavy tails among them."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_t(3, (rows, columns)) * np.arange(1, columns + 1.0) ** -0.7
    weight = weight.astype(np.float32)
    return (weight - reference.nf4_round_trip(weight, double_quant=False)).astype(np.float32)


def after_a_split(rows, columns, seed):
    """What is left of that error when its 16 leading components are taken off, too."""
    left = nf4_error(rows, columns, seed)
    return (left - reference.truncated(left, 16)).astype(np.float32)


def noise(rows, columns, seed):
    return reference.gaussian(rows, columns, seed=seed)


def decaying(rows, columns, seed):
    return reference.decaying(rows, columns, power=0.7, seed=seed)


def assert_exact(matrix):
    values, found = reference.singular_values(matrix), norms(torch.from_numpy(matrix), seeded(0))
    assert found.nuclear_error == 0
    assert found.frobenius == pytest.approx(float(np.linalg.norm(values)), rel=DOUBLE)
    assert found.spectral == pytest.approx(float(values[0]), rel=DOUBLE)
    assert found.nuclear == pytest.approx(float(values.sum()), abs=ROOT * len(values) * float(values[0]))


@pytest.mark.parametrize("shape", [(1, 1), (5, 5), (30, 80), (80, 30), (1, 300), (24, 9001), (4097, 16)])
@pytest.mark.parametrize("kind", [noise, nf4_error])
def test_norms_of_a_matrix_with_a_short_side_are_exact(shape, kind):
    assert_exact(kind(*shape, 0))


@given(st.integers(1, 40), st.integers(1, 40), st.integers(-18, 18), st.integers(0, 99))
def test_norms_are_exact_at_any_scale(rows, columns, exponent, seed):
    assert_exact(noise(rows, columns, seed) * np.float32(10.0**exponent))


def test_norms_of_a_diagonal_can_be_counted_by_hand():
    matrix = torch.diag(torch.tensor([3.0, 0.0, -4.0]))
    found = norms(matrix, seeded(0))
    assert (found.frobenius, found.spectral) == (pytest.approx(5), pytest.approx(4))
    assert (found.nuclear, found.nuclear_error) == (pytest.approx(7), 0)


def assert_estimated_well(matrix, seed):
    values, found = reference.singular_values(matrix), norms(torch.from_numpy(matrix), seeded(seed))
    assert found.frobenius == pytest.approx(float(np.linalg.norm(values)), rel=ROUNDOFF)
    assert found.nuclear == pytest.approx(float(values.sum()), rel=WITHIN)
    assert 0 < found.nuclear_error <= STATED * found.nuclear
    assert abs(found.nuclear - values.sum()) <= 4 * found.nuclear_error
    assert (1 - RITZ) * values[0] <= found.spectral <= (1 + ROUNDOFF) * values[0]


@pytest.mark.parametrize(
    ("kind", "shape", "seed"),
    [*((kind, (300, 420), 0) for kind in (noise, nf4_error, after_a_split, decaying)), (nf4_error, (420, 260), 1)],
)
def test_an_estimate_is_within_two_percent_and_four_standard_errors(shape, kind, seed, monkeypatch):
    monkeypatch.setattr(error, "EXACT_SIDE", 255)
    assert_estimated_well(kind(*shape, seed), seed)


def test_above_1024_on_the_shorter_side_the_norm_is_estimated_well():
    assert_estimated_well(nf4_error(1030, 1026, 5), 5)


def test_up_to_1024_on_the_shorter_side_nothing_is_estimated(monkeypatch):
    monkeypatch.setattr(error, "_probe", None)
    assert norms(torch.eye(1024, 1025), seeded(0)) == Norms(32.0, 1024.0, 0.0, 1.0)
    assert norms(torch.eye(1500, 2), seeded(0)) == Norms(pytest.approx(2**0.5), 2.0, 0.0, 1.0)


def test_the_standard_error_is_the_spread_between_seeds(monkeypatch):
    """Forty estimates: their deviation is known to 11 %, so a factor of 1.6 is five deviations away."""
    monkeypatch.setattr(error, "EXACT_SIDE", 64)
    monkeypatch.setattr(error, "CLOSE_ENOUGH", 1.0)  # one batch each
    matrix = torch.from_numpy(decaying(120, 150, 0))
    found = [norms(matrix, seeded(seed)) for seed in range(40)]
    spread = np.std([one.nuclear for one in found], ddof=1)
    stated = np.sqrt(np.mean([one.nuclear_error**2 for one in found]))
    assert 1 / 1.6 < stated / spread < 1.6


def counted(monkeypatch):
    """A list that grows with every batch of probes, the smallest side estimated being 65."""
    drawn, original = [], error._probe
    monkeypatch.setattr(error, "EXACT_SIDE", 64)
    monkeypatch.setattr(error, "_probe", lambda *given: drawn.append(1) or original(*given))
    return drawn


def test_batches_are_drawn_until_the_standard_error_is_0_6_percent(monkeypatch):
    drawn = counted(monkeypatch)
    found = norms(torch.from_numpy(noise(300, 310, 1)), seeded(0))
    assert found.nuclear_error <= 0.006 * found.nuclear
    before = len(drawn)
    monkeypatch.setattr(error, "CLOSE_ENOUGH", 0.0045)
    tighter = norms(torch.from_numpy(noise(300, 310, 1)), seeded(0))
    assert tighter.nuclear_error <= 0.0045 * tighter.nuclear
    assert before < len(drawn) - before < 16


def test_a_noisy_estimate_draws_further_batches_but_no_more_than_16(monkeypatch):
    """A matrix of rank one: each probe is off by 140 %, so 16 batches are not enough, and the error says so."""
    drawn = counted(monkeypatch)
    matrix = noise(100, 1, 0) @ noise(1, 120, 1)
    found, true = norms(torch.from_numpy(matrix), seeded(0)), float(np.linalg.norm(matrix))
    assert len(drawn) == 16
    assert abs(found.nuclear - true) <= 4 * found.nuclear_error
    assert 0.05 * true < found.nuclear_error < 0.15 * true  # sqrt(2 / 256) = 0.088


def few_rows(count):
    """What NF4 leaves of a pruned weight: all but a few rows are zero."""
    matrix = np.zeros((150, 120), dtype=np.float32)
    matrix[:count] = nf4_error(count, 120, 0)
    return matrix


def equal_values():
    left, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((150, 100)))
    return (3 * left).astype(np.float32)


@pytest.mark.parametrize(
    "matrix",
    [equal_values(), few_rows(1), few_rows(10), few_rows(40)],
    ids=["all equal", "one row", "10 rows", "40 rows"],
)
def test_a_recurrence_that_ends_early_is_measured_right(matrix, monkeypatch):
    """Each probe meets only as many directions as there are distinct singular values: fewer than the steps it has."""
    monkeypatch.setattr(error, "EXACT_SIDE", 64)
    values, found = reference.singular_values(matrix), norms(torch.from_numpy(matrix), seeded(0))
    assert found.spectral == pytest.approx(float(values[0]), rel=4 * ROUNDOFF)
    assert abs(found.nuclear - values.sum()) <= 4 * found.nuclear_error + 4 * ROUNDOFF * values.sum()


def test_the_generator_decides_the_estimate(monkeypatch):
    monkeypatch.setattr(error, "EXACT_SIDE", 64)
    monkeypatch.setattr(error, "CLOSE_ENOUGH", 1.0)  # one batch
    matrix = torch.from_numpy(decaying(120, 150, 0))
    assert norms(matrix, seeded(1)) == norms(matrix, seeded(1))
    assert norms(matrix, seeded(1)).nuclear != norms(matrix, seeded(2)).nuclear


@pytest.mark.parametrize("shape", [(40, 60), (300, 280)])
def test_a_zero_matrix_has_no_error(shape, monkeypatch):
    monkeypatch.setattr(error, "EXACT_SIDE", 64)
    assert norms(torch.zeros(shape), seeded(0)) == Norms(0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_an_empty_matrix_has_no_error(shape):
    assert norms(torch.zeros(shape), seeded(0)) == Norms(0.0, 0.0, 0.0, 0.0)
    assert frobenius(torch.zeros(shape)) == 0


@pytest.mark.parametrize("shape", [(1, 1), (3, 200_001), (5000, 40)])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_frobenius_norm_is_right_to_roundoff(shape, scale):
    matrix = noise(*shape, 0) * np.float32(scale)
    assert frobenius(torch.from_numpy(matrix)) == pytest.approx(
        float(np.linalg.norm(matrix.astype(np.float64))), rel=ROUNDOFF
    )


def test_measuring_leaves_the_matrix_as_it_was(monkeypatch):
    for side in (64, 1024):
        monkeypatch.setattr(error, "EXACT_SIDE", side)
        matrix = torch.from_numpy(noise(120, 100, 0))
        norms(matrix, seeded(0))
        assert np.array_equal(matrix.numpy(), noise(120, 100, 0))


def test_the_estimated_nuclear_norm_of_a_nearly_rank_1_error_is_right() -> None:
    matrix = torch.zeros(1100, 1200)
    matrix[7] = torch.randn(1200, generator=torch.Generator().manual_seed(0))
    found = norms(matrix, torch.Generator().manual_seed(0))
    only_value = float(matrix.double().norm())  # the one singular value is also the sum of all
    assert found.nuclear == pytest.approx(only_value, abs=1e-3 * only_value + 4 * found.nuclear_error)
