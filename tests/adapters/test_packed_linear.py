"""PackedLinear against autograd through a dense layer in float64, whose weight is decoded by definition.

Roundoff: an output is a sum of I products, off by at most one rounding for each step on a number's way times what the
sum gives for the magnitudes (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). A nested scale is
computed in three float32 steps from numbers below 0.4, which is DECODING in the weight.
"""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qsvd.adapters import linear as product
from qsvd.adapters.packed_linear import PackedLinear
from qsvd.numerics.codec import PackedBlocks
from qsvd.numerics.names import codec_named
from tests import reference
from tests.adapters import packed_files
from tests.adapters.principals import SHAPES, UNIT

TOKENS = 11
EXACT = ("nf2-64-bf16", "nf4-32-fp32", "nf8-16-fp16")  # one product of two float32 numbers: the weight has no error
DECODING = 8 * 2.0**-24 * 0.4
REFUSAL = "codes, which cannot be added or cast"


def tensor(*shape, seed=0):
    return torch.from_numpy(reference.gaussian(*shape, seed=seed))


def packed(codec, shape, *, bias_dtype=torch.float32, seed=0):
    """The layer, filled, and its weight by definition, rounded to float32, in float64."""
    parts = packed_files.random_parts(codec, shape, seed)
    linear = PackedLinear(shape[1], shape[0], codec_named(codec), bias_dtype=bias_dtype, device="cpu")
    bias = {} if bias_dtype is None else {"bias": tensor(1, shape[0], seed=7)[0]}
    linear.load_state_dict(parts | bias, strict=True)
    return linear, torch.from_numpy(packed_files.decoded(codec, parts, shape)).float().double()


def outcome(linear, x, dy):
    x = x.detach().requires_grad_()
    y = linear(x)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


def assert_is_dense(linear, weight, x, dy):
    """Output and gradient of the input, in the dtype of x."""
    exact = weight.to(x.dtype).double() if x.dtype == torch.bfloat16 else weight
    bias = 0 if linear.bias is None else linear.bias.detach().double()
    y, dx = outcome(linear, x, dy)
    dense_x = x.double().requires_grad_()
    wanted = dense_x @ exact.T + bias
    (wanted_dx,) = torch.autograd.grad(wanted, dense_x, dy.double())
    steps = 4 if x.dtype == torch.bfloat16 else max(weight.shape) + 4  # in bfloat16 sums are kept in float32
    for ours, dense, factor, matrix in ((y, wanted, x, exact.T), (dx, wanted_dx, dy, exact)):
        size = factor.double().abs() @ matrix.abs() + (abs(bias) if dense is wanted else 0)
        slack = DECODING * factor.double().abs().sum(1, keepdim=True)
        assert ours.dtype == x.dtype
        assert ours.shape == dense.shape
        assert ((ours.double() - dense).abs() <= steps * UNIT[x.dtype] * size + slack).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("codec", packed_files.CODECS)
def test_output_and_gradient_are_those_of_the_dense_layer(codec, shape, dtype):
    linear, weight = packed(codec, shape)
    assert_is_dense(linear, weight, tensor(TOKENS, shape[1], seed=3).to(dtype), tensor(TOKENS, shape[0]).to(dtype))


@pytest.mark.parametrize("codec", EXACT)
def test_in_bfloat16_the_weight_is_rounded_once(codec):
    linear, weight = packed(codec, (70, 172), bias_dtype=torch.bfloat16)
    assert_is_dense(linear, weight, tensor(TOKENS, 172).bfloat16(), tensor(TOKENS, 70, seed=4).bfloat16())
    assert torch.equal(linear(torch.eye(172).bfloat16()) - linear.bias, weight.T.bfloat16() + linear.bias - linear.bias)


@pytest.mark.parametrize("codec", packed_files.CODECS)
def test_the_dense_layer_has_the_same_numbers(codec):
    linear, weight = packed(codec, (33, 64))
    for dtype in (torch.float32, torch.bfloat16):
        dense = linear.dense(dtype)
        assert type(dense) is nn.Linear
        assert dense.weight.dtype == dense.bias.dtype == dtype
        assert torch.equal(dense.bias, linear.bias.to(dtype))
        if codec in EXACT:
            assert torch.equal(dense.weight, weight.to(dtype))
        assert (dense.weight.double() - weight).abs().max() <= DECODING + UNIT[dtype]
    assert linear.train().dense(dtype).training
    assert not linear.eval().dense(dtype).training


def test_gradients_are_finite_differences_that_of_the_bias_too():
    linear, x = packed("nf3-64-8x256", (7, 13))[0].double(), tensor(4, 13).double().requires_grad_()
    linear.bias.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, _: linear(x), (x, linear.bias))
    dy = tensor(400, 7).bfloat16()
    linear.float()(torch.zeros(400, 13).bfloat16()).backward(dy)
    wanted = dy.double().sum(0)
    assert linear.bias.grad.dtype == torch.float32
    assert ((linear.bias.grad - wanted).abs() <= 400 * UNIT[torch.float32] * dy.double().abs().sum(0)).all()


@pytest.mark.parametrize("leading", [(), (1,), (0,), (2, 3), (2, 0, 3)])
def test_leading_dimensions_stay(leading):
    linear, count = packed("nf2-64-bf16", (33, 64))[0], math.prod(leading)
    x = tensor(count, 64).view(*leading, 64).requires_grad_()
    y = linear(x)
    assert y.shape == (*leading, 33)
    assert torch.equal(y.reshape(-1, 33), linear(x.reshape(-1, 64)))
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


@pytest.mark.parametrize("codec", packed_files.CODECS)
def test_no_dense_weight_is_kept(codec, monkeypatch):
    """In the module, for the gradient, or between the passes: the weight is decoded once in each."""
    linear, count, saved = packed(codec, (70, 172))[0], [], []
    held = sum(t.nbytes for t in (*linear.parameters(), *linear.buffers())) - linear.bias.nbytes
    assert held == codec_named(codec).num_bytes((70, 172))
    decode = PackedBlocks.decode
    monkeypatch.setattr(PackedBlocks, "decode", lambda *a, **k: count.append(1) or decode(*a, **k))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = linear(tensor(TOKENS, 172).requires_grad_())
    assert (len(count), len(saved)) == (1, 0)
    y.sum().backward()
    assert len(count) == 2


def test_without_a_gradient_to_give_nothing_is_decoded_again_and_the_output_is_the_same(monkeypatch):
    linear, x = packed("nf2-16-3x16", (33, 64))[0], tensor(TOKENS, 64)
    linear.bias.requires_grad_()
    y = linear(x)
    with monkeypatch.context() as patch:
        patch.setattr("qsvd.adapters.packed_linear.times", None)
        y.sum().backward()
    assert x.grad is None
    assert torch.equal(linear.bias.grad, torch.full((33,), float(TOKENS)))
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(linear(x), y.detach())
    assert not linear.requires_grad_(False)(x).requires_grad


def test_checkpointing_gives_the_same_gradient_and_a_second_derivative_is_refused():
    linear, x = packed("nf3-64-8x256", (33, 64))[0], tensor(TOKENS, 64).requires_grad_()
    again = checkpoint(linear, x, use_reentrant=False)
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (linear(x), again)]
    assert torch.equal(*gradients)
    (gradient,) = torch.autograd.grad(linear(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


def test_autocast_computes_in_its_dtype():
    linear, x, dy = packed("nf3-64-8x256", (33, 64))[0], tensor(TOKENS, 64), tensor(TOKENS, 33).bfloat16()
    wanted, wanted_dx = outcome(linear, x.bfloat16(), dy)
    with torch.autocast("cpu", torch.bfloat16):
        y, dx = outcome(linear, x, dy)
    assert torch.equal(y, wanted)
    assert torch.equal(dx, wanted_dx.float())


@pytest.mark.parametrize("codec", packed_files.CODECS)
def test_a_change_of_dtype_or_device_leaves_the_tensors_to_the_bit(codec):
    linear, _ = packed(codec, (70, 172))
    parts = packed_files.random_parts(codec, (70, 172))
    for change in ("half", "bfloat16", "double", "float", "cpu"):
        getattr(linear, change)()
        state = linear.state_dict()
        assert linear.bias.dtype == state.pop("bias").dtype
        assert {name: t.dtype for name, t in state.items()} == {name: t.dtype for name, t in parts.items()}
        assert all(torch.equal(state[name], tensor) for name, tensor in parts.items())
    assert linear.bias.dtype == torch.float32
    moved = copy.deepcopy(linear).to("meta", torch.float16)
    assert {t.device.type for t in moved.state_dict().values()} == {"meta"}
    assert {name: (t.dtype, t.shape) for name, t in moved.state_dict().items() if name != "bias"} == {
        name: (t.dtype, t.shape) for name, t in parts.items()
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_bands_of_rows_change_nothing_but_the_order_of_sums(monkeypatch, dtype):
    linear, weight = packed("nf3-64-8x256", (129, 96), bias_dtype=None)
    x, dy = tensor(9, 96).to(dtype), tensor(9, 129).to(dtype)
    whole = outcome(linear, x, dy)
    monkeypatch.setattr(product, "BAND", {"cpu": 1})
    for found, wanted in zip(outcome(linear, x, dy), whole, strict=True):
        assert (found - wanted).abs().max() <= (0 if dtype == torch.bfloat16 else 1e-13 * wanted.abs().max())
    assert weight.shape == linear.packed.shape


def test_the_weight_that_others_see_is_codes_and_refuses_to_become_numbers():
    linear, _ = packed("nf2-64-bf16", (4, 64))
    seen, delta = linear.weight, torch.ones(4, 64)
    assert (seen.shape, seen.device.type, seen.dtype, seen.is_floating_point()) == ((64,), "cpu", torch.int8, False)
    assert isinstance(seen, nn.Parameter)
    assert not seen.requires_grad
    assert "int8" in repr(seen)
    before = linear.state_dict()["weight"].clone()
    for attempt in (
        lambda: seen.data,
        lambda: setattr(seen, "data", delta),
        lambda: seen + delta,
        lambda: seen * 1.5,
        lambda: seen.float(),
        lambda: seen.to(torch.bfloat16),
    ):
        with pytest.raises(ValueError, match=REFUSAL):
            attempt()
    assert torch.equal(linear.state_dict()["weight"], before)
    assert linear.state_dict()["weight"].dtype == torch.uint8


def test_codes_that_came_back_as_others_see_them_are_the_same_codes():
    """accelerate, which offloads, brings a weight back in the dtype that it saw."""
    linear, _ = packed("nf8-16-fp16", (33, 64))
    x = tensor(TOKENS, 64)
    wanted = linear(x)
    linear.weight = nn.Parameter(linear.state_dict()["weight"].to(torch.int8), requires_grad=False)
    assert torch.equal(linear(x), wanted)
