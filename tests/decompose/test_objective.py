"""Weights of rows and columns against their definitions in float64 NumPy, and what they refuse."""

import numpy as np
import pytest
import torch

from qsvd.decompose.objective import FLOOR, PLAIN, Objective, fisher, stacked
from tests import reference

UNIT = 2.0**-24  # float32 rounds within this, relatively


def moments(size, seed):
    return torch.from_numpy(np.random.default_rng(seed).lognormal(0, 1, size).astype(np.float32))


def test_scaling_is_by_rows_and_columns_and_can_be_taken_back():
    rows, columns, matrix = moments(6, 0), moments(9, 1), reference.gaussian(6, 9)
    objective = Objective(rows, columns)
    by_hand = np.diag(rows.double().numpy()) @ matrix.astype(np.float64) @ np.diag(columns.double().numpy())
    assert objective.scaled(torch.from_numpy(matrix)).numpy() == pytest.approx(by_hand, rel=3 * UNIT)
    up, down = reference.gaussian(6, 2), reference.gaussian(2, 9)
    found_up, found_down = objective.unscaled(torch.from_numpy(up), torch.from_numpy(down))
    assert found_up.numpy() == pytest.approx(up / rows.double().numpy()[:, None], rel=2 * UNIT)
    assert found_down.numpy() == pytest.approx(down / columns.double().numpy(), rel=2 * UNIT)


@pytest.mark.parametrize("side", ["rows", "columns"])
def test_one_side_alone_leaves_the_other(side):
    weights, matrix = moments(7, 2), reference.gaussian(7, 7)
    objective = Objective(rows_O=weights) if side == "rows" else Objective(columns_I=weights)
    by_hand = matrix * (weights.numpy()[:, None] if side == "rows" else weights.numpy())
    assert np.array_equal(objective.scaled(torch.from_numpy(matrix)).numpy(), by_hand)
    of_rows = objective.of_rows(slice(2, 5)).scaled(torch.from_numpy(matrix[2:5])).numpy()
    assert np.array_equal(of_rows, by_hand[2:5])
    assert not objective.is_plain


def test_plain_leaves_a_matrix_alone():
    matrix = torch.from_numpy(reference.gaussian(3, 4))
    assert PLAIN.scaled(matrix) is matrix
    assert PLAIN.is_plain


def test_the_square_of_the_norm_is_the_sum_of_fisher_times_the_squared_error():
    """F_ij ~ mean_j F * mean_i F / mean F, which is F itself where F is an outer product."""
    true_OI = np.outer(moments(11, 3), moments(5, 4)).astype(np.float64)
    rows, columns = (torch.from_numpy(true_OI.mean(axis).astype(np.float32)) for axis in (1, 0))
    error = reference.gaussian(11, 5)
    expected = (true_OI * error.astype(np.float64) ** 2).sum()
    found = fisher(rows, columns).scaled(torch.from_numpy(error)).double().square().sum().item()
    assert found == pytest.approx(expected, rel=12 * UNIT)


def test_rows_and_columns_without_gradient_get_the_floor():
    rows, columns = torch.tensor([0.0, 1.0, 5.0]), torch.tensor([0.0, 4.0])
    objective = fisher(rows, columns)
    assert objective.rows_O is not None
    assert objective.columns_I is not None
    mean = 2.0
    assert objective.rows_O.tolist() == pytest.approx([(FLOOR * mean) ** 0.5, 1, 5**0.5], rel=2 * UNIT)
    assert objective.columns_I.tolist() == pytest.approx([FLOOR**0.5, 2**0.5], rel=2 * UNIT)


def test_a_weight_without_any_gradient_is_plain():
    assert fisher(torch.zeros(3), torch.zeros(2)).is_plain


@pytest.mark.parametrize("side", ["none", "rows", "both"])
def test_a_metric_leaves_out_what_factors_absorb_and_weighs_columns(side):
    columns = moments(9, 1) if side == "both" else None
    objective = stacked([Objective(moments(6, 0) if side != "none" else None, columns)], (6, 9))
    down, weights = reference.gaussian(2, 9), np.ones(9) if columns is None else columns.double().numpy()
    span = np.linalg.qr((down * weights).T)[0]
    expected = np.diag(weights) @ (np.eye(9) - span @ span.T) @ np.diag(weights)
    found = objective.metric(torch.from_numpy(reference.gaussian(6, 2)), torch.from_numpy(down), 0.03)
    damping = 0.03 * np.square(weights).mean()
    assert found.inputs_II.numpy() == pytest.approx(expected + damping * np.eye(9), abs=9 * UNIT * weights.max() ** 2)
    assert found.outputs_OO is None
    assert (found.columns_I is None) if columns is None else torch.equal(found.columns_I, columns.square())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1e-3])
def test_moments_that_are_none_are_counted(bad):
    sentence = "^2 of 5 moments of the gradient are negative, NaN or infinite$"
    with pytest.raises(ValueError, match=sentence):
        fisher(torch.tensor([1.0, bad, 2.0]), torch.tensor([bad, 1.0]))


def test_weights_that_are_none_are_refused_both_in_one_sentence():
    sentence = (
        r"^the weights of rows are not all finite and above zero: 2 of 3; "
        r"the weights of columns are torch.float64 \(2,\), not a float32 vector$"
    )
    with pytest.raises(ValueError, match=sentence):
        Objective(torch.tensor([0.0, 1.0, float("nan")]), torch.ones(2, dtype=torch.float64))
    with pytest.raises(
        ValueError, match=r"^the weights of columns are torch.float32 \(1, 1, 2\), not a float32 vector$"
    ):
        Objective(columns_I=torch.ones(1, 1, 2))


def test_weights_of_another_shape_are_refused_both_in_one_sentence():
    objective = Objective(torch.ones(3), torch.ones(4))
    objective.check_fits((3, 4))
    sentence = r"^the objective has weights of 3 rows for 4 and 4 columns for 3 of a \(4, 3\) matrix$"
    with pytest.raises(ValueError, match=sentence):
        objective.check_fits((4, 3))
