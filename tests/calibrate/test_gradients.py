"""Singular vectors of the gradient of the mean loss: autograd on transformers' whole model, and NumPy's SVD."""

import numpy as np
import pytest
import torch

from qsvd.calibrate.gradients import PASSES, GradientSums
from qsvd.plan.weights import WeightSpec
from tests import reference
from tests.calibrate.cases import case, examples_of, own_loss, sums_of

RANK = 8
ROUNDOFF = 64 * 2.0**-24  # of the largest singular value, as in test_moments.py
FAMILIES = ("LlamaForCausalLM", "GPTNeoXForCausalLM", "BertForSequenceClassification")
SPEC = WeightSpec("a.weight", "a", (400, 300), "q", 0)


def mean_gradients(one, examples):
    """By module, float64, of the model in float64."""
    whole, modules = one.whole.double(), [spec.module for spec in one.plan.weights]
    weights = [whole.get_parameter(f"{module}.weight") for module in modules]
    loss = sum(own_loss(whole, example) for example in examples) / len(examples)
    found = dict(zip(modules, torch.autograd.grad(loss, weights), strict=True))
    one.whole.float()
    return {module: gradient.numpy() for module, gradient in found.items()}


@pytest.mark.parametrize("architecture", FAMILIES)
def test_they_are_those_of_the_gradient_of_the_whole_model(architecture):
    """Vectors are compared by the matrix that they project the gradient to, which no sign and no near tie changes."""
    one, examples = case(architecture), examples_of(architecture)
    found = sums_of(one.streamed(), examples, gradient_rank=RANK).values
    for module, exact in mean_gradients(one, examples).items():
        left, values, right = (found[f"{module}.gradient_{part}"] for part in ("left", "values", "right"))
        up, singular, down = np.linalg.svd(exact)
        near = ROUNDOFF * singular[0]
        assert (tuple(left.shape), tuple(right.shape)) == ((len(exact), 2 * RANK), (RANK, exact.shape[1]))
        np.testing.assert_allclose(values.numpy(), singular[: 2 * RANK], rtol=0, atol=near)
        for vectors in (left.double().mT, right.double()):
            np.testing.assert_allclose(vectors @ vectors.mT, np.eye(len(vectors)), atol=1e-5)
        lefts, rights = left.double().numpy(), right.double().numpy()
        assert projected(lefts.T @ exact) == pytest.approx(singular[: 2 * RANK], abs=near)
        assert projected(exact @ rights.T) == pytest.approx(singular[:RANK], abs=near)
        gap = singular[0] - singular[1]
        if gap > 0.1 * singular[0]:  # then the first vectors themselves are known, up to a sign they have in common
            sign = np.sign(lefts[:, 0] @ up[:, 0])
            np.testing.assert_allclose(sign * lefts[:, 0], up[:, 0], atol=4 * near / gap)
            np.testing.assert_allclose(sign * rights[0], down[0], atol=4 * near / gap)


def projected(matrix):
    """Its singular values; those of U^T G are the largest of G only if U spans the leading left vectors."""
    return np.linalg.svd(matrix, compute_uv=False)


def test_of_a_large_gradient_the_leading_vectors_are_those_of_an_exact_svd():
    """Singular values that fall by the square root of their number, slowly for a sketch."""
    rows, columns = SPEC.shape
    left, right = (np.linalg.qr(reference.gaussian(side, columns, seed=side))[0] for side in (rows, columns))
    exact = (left * np.arange(1, columns + 1) ** -0.5) @ right.T
    sums = GradientSums(RANK, 0, frozenset())
    for share in (0.25, 0.75):
        sums.add("a", torch.from_numpy(share * exact))
    found = sums.close([SPEC], 2)
    assert PASSES >= 5  # of the authors' svd_lowrank
    singular = np.linalg.svd(exact / 2, compute_uv=False)
    np.testing.assert_allclose(found["a.gradient_values"], singular[: 2 * RANK], rtol=1e-3)
    share = projected(found["a.gradient_left"].double().numpy().T @ exact / 2)
    np.testing.assert_allclose(share, singular[: 2 * RANK], rtol=1e-3)


def test_experts_have_none_and_the_moments_stay_the_same_bits():
    one, examples = case("MixtralForCausalLM"), examples_of("MixtralForCausalLM")
    plain, found = sums_of(one.streamed(), examples).values, sums_of(one.streamed(), examples, gradient_rank=4).values
    assert all(torch.equal(found[name], tensor) for name, tensor in plain.items())
    assert {name.rpartition(".")[0] for name in found.keys() - plain.keys()} == {
        spec.module for spec in one.plan.weights if not spec.stack
    }


def test_a_weight_that_the_loss_does_not_reach_has_orthonormal_vectors_all_the_same():
    found = GradientSums(3, 0, frozenset()).close([SPEC], 1)
    torch.testing.assert_close(found["a.gradient_left"].mT @ found["a.gradient_left"], torch.eye(6))
    assert not found["a.gradient_values"].any()


def test_small_weights_have_as_many_as_half_of_their_smaller_side():
    sums = GradientSums(RANK, 0, frozenset())
    found = sums.close([WeightSpec("a.weight", "a", (7, 40), "q", 0)], 1)
    assert (tuple(found["a.gradient_left"].shape), tuple(found["a.gradient_right"].shape)) == ((7, 6), (3, 40))


def test_a_gradient_that_is_not_finite_is_refused():
    sums = GradientSums(2, 0, frozenset())
    sums.add("a", torch.full(SPEC.shape, torch.inf))
    with pytest.raises(ValueError, match=r"^the gradient of a has a NaN or an infinity; give --dtype float32$"):
        sums.close([SPEC], 1)
