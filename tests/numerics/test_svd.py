"""The best rank-r factors against SciPy's SVD in float64 (Eckart and Young, 1936)."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from qsvd.numerics import svd
from qsvd.numerics.svd import exact_svd, orthonormal, randomized_svd
from tests import reference

UNIT = 2.0**-24  # float32 rounds within this, relatively
ROUNDOFF = 40 * UNIT  # of a norm: a float32 SVD or product of a few hundred terms, whose errors add like a random walk
# What four passes leave above the optimum of a 300 x 420 or 520 x 290 matrix, relative to it, by rank and power of the
# spectrum: mean + 7 deviations over 20 seeds. A flat spectrum behind a rank that is a fifth of the side is the worst.
SKETCH = {(1, 0.5): 1e-8, (8, 0.5): 9e-5, (64, 0.5): 2.4e-3, (1, 1.0): 1e-9, (8, 1.0): 3e-7, (64, 1.0): 3.3e-4,
          (1, 2.0): 1e-9, (8, 2.0): 1e-8, (64, 2.0): 4e-6}  # fmt: skip


def matrix_of(shape, power, seed=0):
    return torch.from_numpy(reference.decaying(*shape, power=power, seed=seed))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def left_over(matrix, top, rank):
    """||M - U S V^T||_F of the leading `rank` triples, summed in float64."""
    left, values, right = (part.double().numpy() for part in (top.left_OK, top.values_K, top.right_KI))
    return float(np.linalg.norm(matrix.double().numpy() - (left[:, :rank] * values[:rank]) @ right[:rank]))


def defect(columns):
    """The largest entry of |Q^T Q - 1|."""
    columns = columns.double().numpy()
    return np.abs(columns.T @ columns - np.eye(columns.shape[1])).max()


def missed(columns, basis):
    """The share of ||columns||_F that lies outside the span of the basis."""
    columns, basis = columns.double().numpy(), basis.double().numpy()
    return np.linalg.norm(columns - basis @ (basis.T @ columns)) / max(np.linalg.norm(columns), 1e-300)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("rank", [1, 8, 64])
@pytest.mark.parametrize("shape", [(300, 420), (520, 290)])
def test_what_a_sketch_leaves_is_the_tail_of_the_spectrum(shape, rank, power, monkeypatch):
    monkeypatch.setattr(svd, "exact_svd", None)  # the sketch has to do it
    matrix = matrix_of(shape, power)
    top = randomized_svd(matrix, rank, passes=4, generator=seeded(1))
    tail = reference.tail(matrix.numpy(), rank)
    assert left_over(matrix, top, rank) <= tail * (1 + SKETCH[rank, power]) + ROUNDOFF
    true = reference.singular_values(matrix.numpy())[:rank]
    assert (top.values_K[:rank].numpy() <= true + ROUNDOFF).all()  # a projection has no larger ones (Cauchy)
    taken = np.linalg.norm(matrix.double().numpy()) ** 2 - left_over(matrix, top, rank) ** 2  # Pythagoras
    assert np.sum(top.values_K[:rank].double().numpy() ** 2) == pytest.approx(taken, rel=4 * ROUNDOFF)


@pytest.mark.parametrize("shape", [(300, 420), (520, 290), (40, 90), (90, 40)])
@pytest.mark.parametrize("rank", [1, 8, 40])
def test_an_exact_svd_leaves_the_tail_of_the_spectrum(shape, rank):
    matrix = matrix_of(shape, 0.7)
    top = exact_svd(matrix, rank)
    assert left_over(matrix, top, rank) == pytest.approx(reference.tail(matrix.numpy(), rank), abs=ROUNDOFF)
    assert top.values_K.numpy() == pytest.approx(reference.singular_values(matrix.numpy())[:rank], abs=ROUNDOFF)
    assert top.left_OK.shape == (shape[0], rank)
    assert top.right_KI.shape == (rank, shape[1])


@given(st.integers(1, 30), st.integers(1, 30), st.data())
def test_any_rank_of_any_small_matrix_is_exact(rows, columns, data):
    rank = data.draw(st.integers(1, min(rows, columns)))
    matrix = torch.from_numpy(reference.gaussian(rows, columns, seed=data.draw(st.integers(0, 999))))
    scale = 10.0 ** data.draw(st.integers(-12, 12))
    top = randomized_svd(matrix * scale, rank, passes=1, generator=seeded(0))
    tail, norm = reference.tail(matrix.numpy() * scale, rank), float(np.linalg.norm(matrix.numpy())) * scale
    assert left_over(matrix * scale, top, rank) == pytest.approx(tail, abs=ROUNDOFF * norm)


@pytest.mark.parametrize("shape", [(300, 300), (280, 500)])
def test_the_full_rank_leaves_nothing(shape):
    matrix = matrix_of(shape, 0.5)
    top = randomized_svd(matrix, min(shape), passes=1, generator=seeded(0))
    assert left_over(matrix, top, min(shape)) <= ROUNDOFF * reference.singular_values(matrix.numpy()).sum()


@pytest.mark.parametrize("shape", [(300, 420), (520, 290)])
@pytest.mark.parametrize("passes", [1, 3])
def test_both_bases_of_a_sketch_are_orthonormal_and_the_values_descend(shape, passes):
    top = randomized_svd(matrix_of(shape, 0.5), 20, passes=passes, generator=seeded(0))
    assert top.left_OK.shape[1] >= 20
    assert defect(top.left_OK) <= ROUNDOFF
    assert defect(top.right_KI.mT) <= ROUNDOFF
    assert (top.values_K.diff() <= 0).all()
    assert (top.values_K >= 0).all()


def test_more_passes_leave_less():
    matrix = matrix_of((400, 300), 0.3)
    left = [
        left_over(matrix, randomized_svd(matrix, 16, passes=passes, generator=seeded(3)), 16) for passes in (1, 2, 4)
    ]
    assert left[0] > left[1] > left[2] >= reference.tail(matrix.numpy(), 16) - ROUNDOFF


def test_a_warm_start_reaches_in_one_pass_what_four_cold_ones_do():
    matrix = matrix_of((420, 300), 0.5)
    first = randomized_svd(matrix, 24, passes=4, generator=seeded(0))
    noise = torch.from_numpy(reference.gaussian(420, 300, seed=9))
    later = matrix + 0.02 * noise * matrix.norm() / noise.norm()
    warm = left_over(later, randomized_svd(later, 24, passes=1, generator=seeded(0), start_KI=first.right_KI), 24)
    cold = {passes: [left_over(later, randomized_svd(later, 24, passes=passes, generator=seeded(seed)), 24)
                     for seed in range(5)] for passes in (1, 4)}  # fmt: skip
    assert warm <= np.mean(cold[4]) + 7 * np.std(cold[4])
    assert min(cold[1]) > np.mean(cold[4]) + 50 * np.std(cold[4])  # so that the claim says something


def test_a_warm_start_draws_nothing():
    matrix = matrix_of((300, 280), 0.5)
    start = randomized_svd(matrix, 8, passes=1, generator=seeded(0)).right_KI
    tops = [randomized_svd(matrix, 8, passes=1, generator=seeded(seed), start_KI=start) for seed in (1, 2)]
    assert torch.equal(tops[0].left_OK, tops[1].left_OK)
    untouched = seeded(5)
    randomized_svd(matrix, 8, passes=1, generator=untouched, start_KI=start)
    assert torch.equal(untouched.get_state(), seeded(5).get_state())


def test_a_start_with_too_few_rows_is_replaced_by_a_fresh_sketch():
    matrix = matrix_of((300, 280), 0.5)
    narrow = randomized_svd(matrix, 4, passes=1, generator=seeded(0)).right_KI
    top = randomized_svd(matrix, 32, passes=4, generator=seeded(7), start_KI=narrow)
    fresh = randomized_svd(matrix, 32, passes=4, generator=seeded(7))
    assert torch.equal(top.right_KI, fresh.right_KI)


def test_the_seed_decides_the_bytes():
    matrix = matrix_of((300, 280), 0.5)
    tops = [randomized_svd(matrix, 12, passes=2, generator=seeded(seed)) for seed in (4, 4, 5)]
    assert torch.equal(tops[0].left_OK, tops[1].left_OK)
    assert torch.equal(tops[0].right_KI, tops[1].right_KI)
    assert not torch.equal(tops[0].right_KI, tops[2].right_KI)


def test_up_to_256_on_a_side_the_seed_does_not_matter():
    matrix = matrix_of((256, 400), 0.2)
    tops = [randomized_svd(matrix, 12, passes=1, generator=seeded(seed)) for seed in (4, 5)]
    assert torch.equal(tops[0].left_OK, tops[1].left_OK)
    assert left_over(matrix, tops[0], 12) == pytest.approx(reference.tail(matrix.numpy(), 12), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(300, 420), (90, 40)])
def test_factors_are_balanced_and_multiply_to_the_leading_part(shape, dtype):
    matrix = matrix_of(shape, 1.0)
    up, down = exact_svd(matrix, 9).factors(6, dtype)
    assert (up.shape, down.shape) == ((shape[0], 6), (6, shape[1]))
    assert up.dtype == down.dtype == dtype
    rounding = {torch.float32: UNIT, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    assert torch.linalg.norm(up.double(), dim=0).numpy() == pytest.approx(
        torch.linalg.norm(down.double(), dim=1).numpy(), rel=2 * rounding + ROUNDOFF
    )
    product = up.double().numpy() @ down.double().numpy()
    miss = np.linalg.norm(product - reference.truncated(matrix.numpy(), 6))
    # every entry of both factors is off by its rounding, the subspace by roundoff over the gap 1/6 - 1/7 (Davis, Kahan)
    assert miss <= 2 * rounding * reference.singular_values(matrix.numpy())[:6].sum() + 42 * ROUNDOFF


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e3, 2e3, 5e3, 1e4, 1e5, 1e7, 1e12, 1e30])
@pytest.mark.parametrize("shape", [(400, 24), (300, 1), (64, 64)])
def test_a_basis_is_orthonormal_and_complete_at_any_conditioning(shape, condition):
    tall = matrix_of(shape, 0.0).double().numpy()
    mixing, _ = scipy.linalg.qr(np.random.default_rng(1).standard_normal((shape[1], shape[1])))
    tall = torch.from_numpy(((tall * np.geomspace(1, 1 / condition, shape[1])) @ mixing).astype(np.float32))
    basis = orthonormal(tall)
    assert defect(basis) <= ROUNDOFF
    assert missed(tall, basis) <= ROUNDOFF


def duplicated():
    half = torch.from_numpy(reference.gaussian(300, 10))
    return torch.cat((half, half), dim=1)


@pytest.mark.parametrize(
    "tall",
    [torch.zeros(300, 12), torch.ones(300, 12), duplicated(), duplicated() * 1e-30, duplicated() * 1e25,
     torch.eye(300, 12) * torch.logspace(0, -30, 12), torch.eye(300, 12) * 1e-22],
    ids=["zeros", "one direction", "every column twice", "tiny", "huge", "graded", "its Gram matrix underflows"],
)  # fmt: skip
def test_a_basis_of_dependent_columns_is_still_orthonormal_and_complete(tall):
    basis = orthonormal(tall)
    assert basis.shape == tall.shape
    assert defect(basis) <= ROUNDOFF
    assert missed(tall, basis) <= ROUNDOFF


def test_of_a_stack_only_the_matrices_with_dependent_columns_are_repaired():
    good = torch.from_numpy(reference.gaussian(300, 20, seed=2))
    stack = torch.stack((good, torch.zeros(300, 20), duplicated(), 2 * good))
    bases = orthonormal(stack)
    for tall, basis in zip(stack, bases, strict=True):
        assert defect(basis) <= ROUNDOFF
        assert missed(tall, basis) <= ROUNDOFF
    upper = np.linalg.qr(good.double().numpy())[1]  # Cholesky-QR has a positive diagonal, Householder's has not
    expected = good.double().numpy() @ np.linalg.inv(upper * np.sign(np.diag(upper))[:, None])
    for basis in bases[[0, 3]]:
        assert basis.numpy() == pytest.approx(expected, abs=ROUNDOFF)


@pytest.mark.parametrize("true_rank", [0, 3])
def test_a_sketch_of_a_matrix_of_low_rank_leaves_nothing(true_rank):
    matrix = torch.from_numpy(reference.gaussian(300, true_rank) @ reference.gaussian(true_rank, 280, seed=1))
    top = randomized_svd(matrix, 20, passes=2, generator=seeded(0))
    assert defect(top.left_OK) <= ROUNDOFF
    assert defect(top.right_KI.mT) <= ROUNDOFF
    assert left_over(matrix, top, 20) <= ROUNDOFF * np.linalg.norm(matrix.numpy())


@pytest.mark.parametrize("shape", [(6, 4), (300, 280)])
@pytest.mark.parametrize("rank", [-1, 0, 281])
def test_a_rank_outside_the_matrix_is_refused(shape, rank):
    matrix, said = torch.zeros(shape), rf"rank {rank} is outside 1\.\.{min(shape)}, the ranks of a \({shape[0]}, "
    with pytest.raises(ValueError, match=said):
        exact_svd(matrix, rank)
    with pytest.raises(ValueError, match=said):
        randomized_svd(matrix, rank, passes=1, generator=seeded(0))


@pytest.mark.parametrize("passes", [0, -2])
def test_no_pass_is_refused(passes):
    with pytest.raises(ValueError, match=f"{passes} passes over the matrix cannot find a subspace"):
        randomized_svd(torch.zeros(6, 4), 1, passes=passes, generator=seeded(0))
