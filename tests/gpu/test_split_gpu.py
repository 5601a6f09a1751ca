"""Splits, factors and norms on a GPU against the CPU and the float64 reference."""

import numpy as np
import pytest
import torch

from qsvd.decompose.alternate import Recipe, split_weight, split_weights
from qsvd.decompose.moments import Moments
from qsvd.decompose.objective import PLAIN
from qsvd.decompose.split import measure, measure_stack
from qsvd.numerics import norms
from qsvd.numerics.nf4 import NormalFloat4
from qsvd.numerics.svd import orthonormal
from tests import reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

ROUNDOFF = 40 * 2.0**-24  # of a norm: float32 sums of a few hundred products
NF4 = NormalFloat4(double_quant=False)


def weight_of(shape, power=0.5):
    matrix = reference.decaying(*shape, power=power)
    return torch.from_numpy(matrix * np.float32((shape[0] * shape[1]) ** 0.5 / np.linalg.norm(matrix)))


def float64_distance(weight, split):
    """||W - Q - B A||_F, codes decoded by definition."""
    indices = reference.unpacked(split.residual.codes.cpu().numpy(), weight.numel())
    residual = reference.nf4_decode(indices, split.residual.scales.cpu().numpy(), tuple(weight.shape))
    low_rank = split.up_OR.cpu().double().numpy() @ split.down_RI.cpu().double().numpy()
    return float(np.linalg.norm(weight.double().numpy() - residual - low_rank))


@pytest.mark.parametrize(("order", "end"), [("svd", "svd"), ("svd", "quantize"), ("quantize", "svd")])
def test_the_distance_reported_is_that_of_what_is_stored(order, end):
    weight = weight_of((300, 688))
    split = split_weight(weight.cuda(), Recipe(NF4, 16, 3, order, end))
    assert split.residual.codes.is_cuda
    assert split.up_OR.is_cuda
    assert min(split.history) == pytest.approx(
        float64_distance(weight, split), abs=ROUNDOFF * float(weight.double().norm())
    )


@pytest.mark.parametrize("columns", [640, 600])
@pytest.mark.parametrize("double_quant", [False, True])
def test_feedback_ends_where_it_ends_on_a_cpu(double_quant, columns):
    weight, codec = weight_of((300, columns)), NormalFloat4(double_quant=double_quant)
    fed = Recipe(codec, 16, 3, rounding="feedback")
    found, expected = (min(split_weight(one, fed).history) for one in (weight.cuda(), weight))
    assert found == pytest.approx(expected, rel=0.01)
    nearest = min(split_weight(weight.cuda(), Recipe(codec, 16, 3, scales="mse")).history)
    assert found <= nearest * (1 + 1e-6)


@pytest.mark.parametrize("has_gradients", [False, True])
@pytest.mark.parametrize("double_quant", [False, True])
def test_a_split_with_moments_ends_where_it_ends_on_a_cpu(double_quant, has_gradients):
    weight, draw = weight_of((300, 640)), torch.Generator().manual_seed(0)
    inputs, gradients = (torch.randn(2000, size, generator=draw) * torch.rand(size) for size in (640, 300))
    moments = Moments(inputs.mT @ inputs, gradients.mT @ gradients if has_gradients else None)
    fed = Recipe(NormalFloat4(double_quant=double_quant), 16, 2, rounding="feedback")
    found, expected = (split_weight(one, fed, objective=moments) for one in (weight.cuda(), weight))
    assert found.residual.codes.is_cuda
    assert min(found.history) == pytest.approx(min(expected.history), rel=0.02)
    assert min(found.history) < 0.9 * found.history[0]


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(("order", "end"), [("svd", "svd"), ("svd", "quantize"), ("quantize", "svd")])
def test_the_error_is_one_that_the_cpu_might_have_reached(order, end, double_quant):
    """Other sketches and ties: within seven deviations of what the CPU reaches from six seeds."""
    weight = weight_of((420, 320))
    recipe = Recipe(NormalFloat4(double_quant=double_quant), 16, 3, order, end)
    on_cpu = [min(split_weight(weight, recipe, seed=seed).history) for seed in range(6)]
    on_gpu = min(split_weight(weight.cuda(), recipe).history)
    allowed = 7 * float(np.std(on_cpu, ddof=1)) + ROUNDOFF * float(weight.norm())
    assert on_gpu == pytest.approx(float(np.mean(on_cpu)), abs=allowed)


def test_a_stack_of_experts_with_one_of_zeros_is_split_as_they_are_alone():
    stack = torch.stack((weight_of((420, 320)), torch.zeros(420, 320), weight_of((420, 320), 1.0)))
    recipe, seeds = Recipe(NF4, 16, 3), (1, 2, 3)
    splits = split_weights(stack.cuda(), recipe, seeds=seeds, objectives=(PLAIN,) * 3)
    errors = measure_stack(stack.cuda(), splits, names="abc", role="expert up", seeds=seeds)
    for weight, split, error, seed in zip(stack, splits, errors, seeds, strict=True):
        rounding = ROUNDOFF * float(weight.double().norm())
        assert min(split.history) == pytest.approx(float64_distance(weight, split), abs=rounding)
        assert error.after.frobenius == pytest.approx(float64_distance(weight, split), abs=rounding)
        alone = split_weight(weight.cuda(), recipe, seed=seed)
        assert min(split.history) == pytest.approx(min(alone.history), rel=1e-3, abs=rounding)


@pytest.mark.parametrize("exact", [False, True])
def test_the_same_seed_gives_the_same_bytes(exact):
    weight = weight_of((420, 320)).cuda()
    first, second = (split_weight(weight, Recipe(NF4, 16, 3, exact=exact), seed=5) for _ in range(2))
    assert torch.equal(first.residual.codes, second.residual.codes)
    assert torch.equal(first.up_OR, second.up_OR)
    assert torch.equal(first.down_RI, second.down_RI)
    assert first.history == second.history


def test_another_seed_gives_other_bytes():
    weight = weight_of((420, 320)).cuda()
    first, second = (split_weight(weight, Recipe(NF4, 16, 1), seed=seed) for seed in (5, 6))
    assert not torch.equal(first.down_RI, second.down_RI)


def test_a_transposed_view_splits_like_its_copy():
    view = weight_of((60, 50)).cuda().mT
    first, second = (split_weight(one, Recipe(NF4, 4, 3)) for one in (view, view.contiguous()))
    assert torch.equal(first.residual.codes, second.residual.codes)
    assert first.history == second.history


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e4, 1e7, 1e30])
def test_a_basis_is_orthonormal_at_any_conditioning(condition):
    tall = weight_of((400, 24), power=0.0) * torch.logspace(0, -float(np.log10(condition)), 24)
    basis = orthonormal(tall.cuda()).double().cpu().numpy()
    assert np.abs(basis.T @ basis - np.eye(24)).max() <= ROUNDOFF
    columns = tall.double().numpy()
    assert np.linalg.norm(columns - basis @ (basis.T @ columns)) <= ROUNDOFF * np.linalg.norm(columns)


def test_nans_and_infinities_are_counted():
    weight = weight_of((12, 10))
    weight[3, 3:5] = torch.tensor([torch.nan, torch.inf])
    with pytest.raises(ValueError, match="2 of 120 values are NaN or infinite"):
        split_weight(weight.cuda(), Recipe(NF4, 2))


@pytest.mark.parametrize("estimated", [False, True])
def test_norms_are_those_of_the_error_in_float64(estimated, monkeypatch):
    monkeypatch.setattr(norms, "EXACT_SIDE", 64 if estimated else 1024)
    weight = weight_of((300, 420))
    split = split_weight(weight.cuda(), Recipe(NF4, 16, 2))
    found = measure(weight.cuda(), split, name="", role="").after
    values = reference.singular_values(split.error(weight.cuda()).cpu().numpy())
    assert found.frobenius == pytest.approx(float(np.linalg.norm(values)), rel=ROUNDOFF)
    assert found.spectral == pytest.approx(float(values[0]), rel=ROUNDOFF)
    assert abs(found.nuclear - values.sum()) <= 4 * found.nuclear_error + ROUNDOFF * values.sum()
