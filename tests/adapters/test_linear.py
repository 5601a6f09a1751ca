"""SplitLinear against autograd through the dense formula in float64.

Roundoff: outputs and gradients are polynomials with positive coefficients in x, Q, the factors, the gain, the bias and
the gradient that comes in. A computed one is off by at most one rounding for each step on a number's way, times what
the polynomial gives for the magnitudes (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1).
"""

import copy
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from qsvd.adapters.linear import SplitLinear
from qsvd.numerics.codec import NestedScales, PackedBlocks
from tests import reference
from tests.adapters.principals import SHAPES, UNIT, Given, decoded, dense_output, packed_residual, principal_of

TOKENS = 11
RANK = 3
PRODUCTS = 8  # more roundings beside the sums: of the gain, of the two terms' sum, of the bias
CASTS = (
    6  # in bfloat16 five: of x A^T, of x Q^T, of their sum, after the gain, after the bias; and what five multiply to
)


def tensor(*shape, seed=0):
    return torch.from_numpy(reference.gaussian(*shape, seed=seed))


def module_of(shape, *, has_gain=True, has_bias=True, double_quant=False):
    bias = tensor(1, shape[0], seed=7)[0] if has_bias else None
    return SplitLinear(packed_residual(shape, double_quant=double_quant), Given(shape, RANK, has_gain=has_gain), bias)


def operands(module):
    """Q, up, down, gain and bias in float64, what is trained as leaves."""
    trained = [module.adapter.up, module.adapter.down, module.adapter.factor]
    trained = [None if p is None else p.detach().double().requires_grad_() for p in trained]
    return decoded(module.residual), *trained, None if module.bias is None else module.bias.detach().double()


def found(module, x, dy):
    """Output and gradients of x, up, down and gain."""
    module.zero_grad()
    x = x.detach().requires_grad_()
    y = module(x)
    y.backward(dy)
    parameters = (module.adapter.up, module.adapter.down, module.adapter.factor)
    return y.detach(), x.grad, *(None if p is None else p.grad for p in parameters)


def expected(dense, x, dy):
    """The same from the dense formula."""
    residual, up, down, gain, bias = dense
    x = x.detach().double().requires_grad_()
    leaves = [x, up, down] if gain is None else [x, up, down, gain]
    y = dense_output(x, residual, up, down, gain, bias)
    gradients = torch.autograd.grad(y, leaves, dy.double())
    return y.detach(), *gradients, *((None,) if gain is None else ())


def magnitudes(dense, x, dy):
    """What the polynomials give for absolute values."""
    absolute = [None if t is None else t.detach().abs().requires_grad_(t.requires_grad) for t in dense]
    return expected(absolute, x.abs(), dy.abs())


def assert_close(ours, exact, size, relative):
    for one, other, bound in zip(ours, exact, size, strict=True):
        assert (one is None) == (other is None)
        if other is not None:
            assert one.shape == other.shape
            assert ((one.double() - other).abs() <= relative * bound).all()


def assert_is_the_dense_formula(module, x, dy):
    dense = operands(module)
    roundings = sum(module.residual.shape) + TOKENS + RANK + PRODUCTS
    bound = 2 * roundings * UNIT[x.dtype]  # ours and autograd's
    assert_close(found(module, x, dy), expected(dense, x, dy), magnitudes(dense, x, dy), bound)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_gain", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_output_and_gradients_are_those_of_the_dense_formula(dtype, shape, has_gain, has_bias, double_quant):
    module = module_of(shape, has_gain=has_gain, has_bias=has_bias, double_quant=double_quant)
    x, dy = tensor(TOKENS, shape[1], seed=3).to(dtype), tensor(TOKENS, shape[0], seed=4).to(dtype)
    assert_is_the_dense_formula(module.to(dtype), x, dy)


@pytest.mark.parametrize("has_gain", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_in_bfloat16_each_step_is_rounded_once_and_float32_parameters_have_float32_gradients(shape, has_gain):
    """Against the formula for Q and the factors as bfloat16 has them; sums are kept in float32."""
    module = module_of(shape, has_gain=has_gain)
    x, dy = tensor(TOKENS, shape[1], seed=3).bfloat16(), tensor(TOKENS, shape[0], seed=4).bfloat16()
    ours = found(module, x, dy)
    dtypes = [t.dtype for t in ours if t is not None]
    assert dtypes == [torch.bfloat16] * 2 + [torch.float32] * (3 if has_gain else 2)
    *rounded, gain, bias = operands(module)
    rounded = [*(t.bfloat16().double().requires_grad_(t.requires_grad) for t in rounded), gain, bias]
    assert_close(ours, expected(rounded, x, dy), magnitudes(rounded, x, dy), CASTS * UNIT[torch.bfloat16])


@pytest.mark.parametrize("gain", [1.1, 1.003, 0.95])
def test_a_gain_is_not_rounded_to_bfloat16(gain):
    """Roundings of many outputs cancel, that of a gain would not: seven deviations of their mean."""
    module, x = module_of((70, 172), has_bias=False), tensor(2000, 172).bfloat16()
    module.adapter.factor.data.fill_(1)
    ones = module(x).detach()
    module.adapter.factor.data.fill_(gain)
    y = module(x).detach()
    allowed = 7 * UNIT[torch.bfloat16] / ones.numel() ** 0.5
    assert (y * ones.double()).sum() / ones.double().square().sum() == pytest.approx(gain, abs=allowed)


@pytest.mark.parametrize("has_gain", [False, True])
def test_gradients_are_finite_differences(has_gain):
    module, x = module_of((7, 13), has_gain=has_gain).double(), tensor(4, 13).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: module(x), (x, *module.adapter.parameters()))


@pytest.mark.parametrize("has_gain", [True, False])
def test_its_weight_is_the_dense_matrix_without_a_gradient(has_gain):
    module = module_of(SHAPES[0], has_gain=has_gain)
    x = torch.eye(SHAPES[0][1])
    bias = 0 if module.bias is None else module.bias
    assert not module.weight.requires_grad
    torch.testing.assert_close(module.weight, (module(x) - bias).T.detach())
    assert module.to(torch.bfloat16).weight.dtype == torch.bfloat16


@pytest.mark.parametrize("leading", [(), (1,), (0,), (2, 3), (2, 0, 3), (2, 1, 3)])
def test_leading_dimensions_stay(leading):
    module, count = module_of((33, 64)), math.prod(leading)
    x = tensor(count, 64).view(*leading, 64).requires_grad_()
    y = module(x)
    assert y.shape == (*leading, 33)
    assert torch.equal(y.reshape(-1, 33), module(x.reshape(-1, 64)))
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


def test_a_transposed_input_and_gradient_are_as_good_and_nothing_is_written_to():
    module, wide, dy = module_of((33, 64)), tensor(64, TOKENS), tensor(33, TOKENS)
    before = [t.clone() for t in (wide, dy, *module.parameters(), *module.buffers())]
    assert_is_the_dense_formula(module, wide.T, dy.T)
    assert all(map(torch.equal, (wide, dy, *module.parameters(), *module.buffers()), before))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_the_output_is_the_same_without_gradients(context):
    module, x = module_of((70, 172)), tensor(TOKENS, 172)
    with context():
        without = module(x)
    assert not without.requires_grad
    assert torch.equal(without, module(x).detach())


@pytest.mark.parametrize("has_gain", [False, True])
def test_autocast_computes_in_its_dtype_and_gradients_come_in_the_parameters_own(has_gain):
    module = module_of((70, 172), has_gain=has_gain)
    x, dy = tensor(TOKENS, 172), tensor(TOKENS, 70).bfloat16()
    cast = found(module, x.bfloat16(), dy)
    with torch.autocast("cpu", torch.bfloat16):
        ours = found(module, x, dy)
    assert ours[0].dtype == torch.bfloat16
    assert ours[1].dtype == torch.float32
    for one, other in zip(ours, cast, strict=True):
        assert one is other is None or torch.equal(one.float(), other.float())


@pytest.mark.parametrize("has_gain", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(has_gain):
    module = module_of((70, 172), has_gain=has_gain)
    again = copy.deepcopy(module)
    again.forward = lambda x: checkpoint(SplitLinear.forward, again, x, use_reentrant=False)
    x, dy = tensor(TOKENS, 172), tensor(TOKENS, 70)
    for one, other in zip(found(module, x, dy), found(again, x, dy), strict=True):
        assert one is other is None or torch.equal(one, other)


def kept(module, x):
    """What autograd keeps between the two passes."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        module(x)
    return saved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_between_the_passes_only_the_input_and_what_is_small_is_kept(dtype):
    shape = (70, 172)
    x = tensor(TOKENS, 172).to(dtype).requires_grad_()
    inputs, hidden, factors = (TOKENS, 172), (TOKENS, RANK), [(70, RANK), (RANK, 172)]
    plain, gained = (kept(module_of(shape, has_gain=has_gain), x) for has_gain in (False, True))
    assert {tuple(t.shape) for t in plain} == {inputs, hidden, *factors}
    assert {tuple(t.shape) for t in gained} == {inputs, hidden, *factors, (70,), (TOKENS, 70)}
    assert (len(plain), len(gained)) == (4, 6)


def test_input_and_factors_are_kept_by_reference():
    module = module_of((70, 172))
    x = tensor(2 * TOKENS, 172).view(2, TOKENS, 172).requires_grad_()
    addresses = {t.data_ptr() for t in kept(module, x)}
    assert addresses >= {t.data_ptr() for t in (x, *module.adapter.parameters())}


def test_the_residual_is_decoded_once_a_pass_and_for_the_gradient_only_if_the_input_needs_one(monkeypatch):
    module, count = module_of((33, 64)), []
    decode = PackedBlocks.decode
    monkeypatch.setattr(PackedBlocks, "decode", lambda *a, **k: count.append(1) or decode(*a, **k))
    module(tensor(TOKENS, 64)).sum().backward()
    assert len(count) == 1
    assert module.adapter.up.grad is not None
    module(tensor(TOKENS, 64).requires_grad_()).sum().backward()
    assert len(count) == 3


@pytest.mark.parametrize("needed", ["x", "up", "down", "factor"])
def test_each_gradient_comes_alone_too(needed):
    module, dy = module_of((33, 64)), tensor(TOKENS, 33)
    both = dict(zip(("y", "x", "up", "down", "factor"), found(module, tensor(TOKENS, 64), dy), strict=True))
    module.zero_grad()
    for name, parameter in module.adapter.named_parameters():
        parameter.requires_grad_(name == needed)
    x = tensor(TOKENS, 64).requires_grad_(needed == "x")
    module(x).backward(dy)
    leaves = {"x": x} | dict(module.adapter.named_parameters())
    assert torch.equal(leaves.pop(needed).grad, both[needed])
    assert all(leaf.grad is None for leaf in leaves.values())


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_change_of_dtype_leaves_the_residual_to_the_bit(double_quant):
    module = module_of((70, 172), double_quant=double_quant)
    before = decoded(packed_residual((70, 172), double_quant=double_quant))
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
        module.to(dtype)
        assert module.adapter.up.dtype == module.bias.dtype == dtype
        assert torch.equal(module.residual.decode().double(), before)
        assert torch.equal(decoded(module.residual), before)
    assert isinstance(module.residual.scales, NestedScales) == double_quant


def test_the_state_is_what_is_not_in_the_base_and_the_bias():
    module = module_of((33, 64), double_quant=True)
    assert set(module.state_dict()) == {"adapter.up", "adapter.down", "adapter.factor", "bias"}


def test_a_second_derivative_is_refused_rather_than_wrong():
    module, x = module_of((3, 5)), tensor(TOKENS, 5).requires_grad_()
    (gradient,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(70, 172), (129, 96)])
def test_bands_of_rows_change_nothing_but_the_order_of_sums(monkeypatch, shape, dtype):
    """In 16 bits not even that: the gradient of x then comes from one product."""
    principal = principal_of(shape, 3)
    module = SplitLinear(principal.residual, Given(shape, 3, has_gain=False), None).to(dtype)
    inputs, gradients = (torch.from_numpy(reference.gaussian(9, side, seed=side)).to(dtype) for side in reversed(shape))

    def outcome():
        x = inputs.clone().requires_grad_()
        y = module(x)
        return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], gradients)]

    whole = outcome()
    monkeypatch.setattr("qsvd.adapters.linear.BAND", {"cpu": 1})
    assert len(list(principal.residual.in_rows(1))) > 2
    for found, wanted in zip(outcome(), whole, strict=True):
        bound = 0 if dtype == torch.bfloat16 else 1e-13 * wanted.abs().max().item()
        assert (found - wanted).abs().max().item() <= bound
