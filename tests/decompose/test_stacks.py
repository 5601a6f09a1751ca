"""Weights that are split in one stack against the same weights alone, and against NumPy in float64."""

import numpy as np
import pytest
import torch

from qsvd.decompose.alternate import Recipe, split_weight, split_weights
from qsvd.decompose.objective import PLAIN, Objective, fisher
from qsvd.decompose.split import measure, measure_stack
from qsvd.numerics.nf4 import NormalFloat4
from tests import reference
from tests.decompose.test_alternate import ROUNDOFF, SHORT, Scripted, distance, weight_of

NF4 = NormalFloat4(double_quant=True)
FLIPS = 1e-4  # of an error: rounding moves a few values of 84,000 across the boundary of two levels
SHAPE = (300, 280)  # above the side that is decomposed exactly


def weights():
    """Of full rank, of zeros, of rank 2 with zero rows, and steep."""
    low = reference.gaussian(300, 2) @ reference.gaussian(2, 280, seed=1)
    low[:50] = 0
    return np.stack([weight_of(SHAPE), np.zeros(SHAPE, np.float32), low, weight_of(SHAPE, 3, power=1.0)])


def moments(seed):
    draw = torch.Generator().manual_seed(seed)
    return fisher(*(torch.rand(size, generator=draw) + 0.1 for size in SHAPE))


OBJECTIVES = {
    "plain": (PLAIN, PLAIN, PLAIN, PLAIN),
    "weighted": (moments(0), moments(1), moments(2), moments(3)),
    "some": (moments(0), PLAIN, Objective(None, moments(2).columns_I), Objective(moments(3).rows_O, None)),
}


@pytest.mark.parametrize("objectives", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize(("order", "end"), [("svd", "svd"), ("quantize", "svd"), ("svd", "quantize")])
def test_a_weight_has_in_a_stack_the_error_that_it_has_alone(order, end, objectives):
    recipe, seeds = Recipe(NF4, 8, 4, order, end, dtype=torch.float32), (5, 6, 7, 8)
    stack = weights()
    splits = split_weights(torch.from_numpy(stack), recipe, seeds=seeds, objectives=objectives)
    for weight, split, seed, objective in zip(stack, splits, seeds, objectives, strict=True):
        alone = split_weight(torch.from_numpy(weight), recipe, seed=seed, objective=objective)
        rounding = ROUNDOFF * float(np.linalg.norm(weight))
        assert distance(weight, split) == pytest.approx(distance(weight, alone), rel=FLIPS, abs=rounding)
        assert min(split.history) == pytest.approx(min(alone.history), rel=FLIPS, abs=rounding)
        if objective.is_plain:
            assert min(split.history) == pytest.approx(distance(weight, split), abs=rounding)
        if objective.is_plain and end == "svd":  # the last factors are those of NumPy's SVD
            best = reference.tail(weight - split.residual.decode().double().numpy(), 8)
            assert distance(weight, split) == pytest.approx(best, rel=SHORT[order], abs=rounding)


def test_a_weight_whose_error_rose_keeps_its_split_while_others_go_on():
    codec = Scripted((5, 4, 3, 3, 4, 2, 1, 1))  # of the first, of the second, and so on
    stack = torch.from_numpy(np.stack([weight_of((16, 24), seed) for seed in (0, 1)]))
    recipe = Recipe(codec, 2, 4, "svd", "quantize", "rise", dtype=torch.float32)
    first, second = split_weights(stack, recipe, seeds=(0, 0), objectives=(PLAIN, PLAIN))
    assert first.history == pytest.approx((5, 3, 4), abs=ROUNDOFF * 20)
    assert (first.iteration, int(first.residual.codes)) == (2, 2)
    assert second.history == pytest.approx((4, 3, 2, 1), abs=ROUNDOFF * 20)
    assert (second.iteration, int(second.residual.codes)) == (4, 7)
    assert first.error(stack[0]).norm().item() == pytest.approx(3, abs=ROUNDOFF * 20)


def test_a_stack_is_measured_as_its_weights_are_alone():
    stack = torch.from_numpy(weights()).bfloat16()
    splits = split_weights(stack, Recipe(NF4, 8, 1), seeds=(0,) * 4, objectives=(PLAIN,) * 4)
    found = measure_stack(stack, splits, names="abcd", role="q", seeds=(0,) * 4)
    for name, weight, split, error in zip("abcd", stack, splits, found, strict=True):
        alone = measure(weight, split, name=name, role="q")
        assert (error.name, error.shape, error.rank, error.bits) == (name, SHAPE, 8, alone.bits)
        assert error.weight_frobenius == pytest.approx(alone.weight_frobenius)
        for part in ("frobenius", "nuclear", "spectral"):
            for one, other in ((error.before, alone.before), (error.after, alone.after)):
                assert getattr(one, part) == pytest.approx(getattr(other, part), rel=1e-6)


def test_weights_of_a_stack_with_nans_are_refused():
    stack = torch.from_numpy(weights())
    stack[2, 5, :3] = torch.nan
    with pytest.raises(ValueError, match=r"^3 of 84000 values are NaN or infinite$"):
        split_weights(stack, Recipe(NF4, 2), seeds=(0,) * 4, objectives=(PLAIN,) * 4)
