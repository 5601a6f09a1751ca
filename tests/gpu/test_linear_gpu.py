"""SplitLinear on a GPU: what the CPU computes, with nothing dense kept.

Bounds as in tests/adapters/test_linear.py: one rounding for each step on a number's way, times the same polynomial of
the magnitudes.
"""

import copy

import pytest
import torch

from qsvd.adapters.adapter import AdapterOptions, StoredWeight
from qsvd.adapters.linear import SplitLinear
from qsvd.adapters.methods.table import METHODS
from tests import reference
from tests.adapters.principals import UNIT, Given, decoded, dense_output, own_options, packed_residual, principal_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPES = ((64, 128), (172, 320), (70, 172), (33, 64), (3, 5))
RANK, TOKENS = 3, 16
PRODUCTS = 8  # more roundings beside the sums
CASTS = 6  # in bfloat16: see tests/adapters/test_linear.py
SLACK = 1 << 20  # bytes that the allocator rounds up to, and cuBLAS' small change


@pytest.fixture(autouse=True)
def _sums_in_float32():
    """PyTorch lets cuBLAS add partial sums of bfloat16 products in bfloat16."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = False
    yield
    matmul.allow_bf16_reduced_precision_reduction = before


def draw(*shape, seed):
    return torch.from_numpy(reference.gaussian(*shape, seed=seed))


def module_of(shape, *, has_gain=True, double_quant=False):
    adapter = Given(shape, RANK, has_gain=has_gain)
    return SplitLinear(packed_residual(shape, double_quant=double_quant), adapter, draw(1, shape[0], seed=7)[0])


def passes(run, x, dy, leaves):
    """Output and gradients of x and the leaves, in float64 on the CPU."""
    x = x.detach().requires_grad_()
    y = run(x)
    return [t.detach().double().cpu() for t in (y, *torch.autograd.grad(y, [x, *leaves], dy))]


def by_formula(module, x, dy, *, dtype, magnitudes=False):
    """The same by the dense formula in float64, for Q and factors as `dtype` has them, or for all magnitudes."""

    def operand(tensor, dtype=torch.float32):
        tensor = tensor.detach().cpu().to(dtype).double()
        return (tensor.abs() if magnitudes else tensor).requires_grad_()

    residual, x, dy = operand(decoded(module.residual).float(), dtype), operand(x), operand(dy)
    up, down, *gain = module.adapter.parameters()
    leaves, bias = [operand(up, dtype), operand(down, dtype), *map(operand, gain)], operand(module.bias)
    return passes(lambda x: dense_output(x, residual, *leaves[:2], *(leaves[2:] or [None]), bias), x, dy, leaves)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("has_gain", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_are_those_of_the_dense_formula(shape, dtype, has_gain, double_quant):
    module = module_of(shape, has_gain=has_gain, double_quant=double_quant)
    x, dy = draw(TOKENS, shape[1], seed=3).to(dtype), draw(TOKENS, shape[0], seed=4).to(dtype)
    exact = by_formula(module, x, dy, dtype=dtype)
    sizes = by_formula(module, x, dy, dtype=dtype, magnitudes=True)
    module.cuda()
    ours = passes(module, x.cuda(), dy.cuda(), list(module.adapter.parameters()))
    roundings = sum(shape) + TOKENS + RANK + PRODUCTS
    bound = roundings * UNIT[torch.float32] + (CASTS * UNIT[dtype] if dtype == torch.bfloat16 else 0)
    for one, other, size in zip(ours, exact, sizes, strict=True):
        assert ((one - other).abs() <= bound * size).all()


def test_output_and_gradients_have_the_dtypes_that_they_have_on_the_cpu():
    module, x = module_of((64, 128)).cuda(), draw(TOKENS, 128, seed=3).cuda().bfloat16().requires_grad_()
    y = module(x)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    assert all(p.grad.dtype == torch.float32 for p in module.adapter.parameters())


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_residual_is_untouched_by_the_move_and_by_training(shape, double_quant):
    module = module_of(shape, double_quant=double_quant)
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    module.cuda().to(torch.bfloat16)
    optimizer = torch.optim.SGD(module.adapter.parameters(), lr=0.1)
    module(draw(TOKENS, shape[1], seed=3).cuda().bfloat16().requires_grad_()).sum().backward()
    optimizer.step()
    assert all(torch.equal(buffer.cpu(), before[name]) for name, buffer in module.named_buffers())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_to_half_precision_rounds_the_float32_numbers_once(shape, dtype):
    """By torch: where a CPU has no AVX-512, bitsandbytes' own float16 rounds ties up (5 of shape 172 x 320)."""
    packed = packed_residual(shape)
    found, expected = packed.to(torch.device("cuda")).decode(dtype=dtype).cpu(), packed.decode().to(dtype)
    other = found != expected
    assert not other.any(), (found[other], expected[other], packed.decode()[other])


@pytest.mark.parametrize("has_gain", [False, True])
def test_no_dense_weight_is_kept_after_the_forward_pass(has_gain):
    side, tokens = 4096, 8
    module = module_of((side, side), has_gain=has_gain).cuda()
    x = draw(tokens, side, seed=3).cuda().bfloat16().requires_grad_()
    module(x).sum().backward()  # cuBLAS takes its workspace
    module.zero_grad(set_to_none=True)
    x.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = module(x)
    assert y.requires_grad
    assert torch.cuda.memory_allocated() - before < SLACK
    y.sum().backward()
    del y
    x.grad = None
    module.zero_grad(set_to_none=True)
    assert torch.cuda.memory_allocated() - before < SLACK
    assert side * side * 2 > 30 * SLACK, "a weight in bfloat16 would be seen"


@pytest.mark.parametrize("method", METHODS)
def test_each_method_starts_on_the_gpu_as_on_the_cpu(method):
    shape = (70, 172)
    principal = principal_of(shape, RANK, double_quant=True)
    moved = StoredWeight(principal.residual.to(torch.device("cuda")), principal.up_OR.cuda(), principal.down_RI.cuda())
    options = AdapterOptions(method, rank=RANK, own=own_options(method, shape))
    on_cpu, on_gpu = (
        METHODS[method].start(one, options, torch.Generator().manual_seed(0)) for one in (principal, moved)
    )
    assert {t.device.type for t in (*on_gpu.parameters(), *on_gpu.buffers())} == {"cuda"}
    assert all(torch.equal(one.cpu(), other) for one, other in zip(on_gpu.factors(), on_cpu.factors(), strict=True))
    gain = on_gpu.gain(None)
    assert gain is None or torch.equal(gain.cpu(), torch.ones(shape[0]))


@pytest.mark.parametrize("method", METHODS)
def test_autocast_on_the_gpu_computes_in_bfloat16(method):
    principal = principal_of((70, 172), RANK)
    options = AdapterOptions(method, rank=RANK, own=own_options(method, (70, 172)))
    module = SplitLinear(principal.residual, METHODS[method].start(principal, options, torch.Generator()), None)
    cast = copy.deepcopy(module).cuda()(draw(TOKENS, 172, seed=3).cuda().bfloat16())
    with torch.autocast("cuda", torch.bfloat16):
        ours = module.cuda()(draw(TOKENS, 172, seed=3).cuda())
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, cast)
