"""RandLoRA: the sum of products in float64 for weights of all shapes, PEFT's layer, and what is kept.

Shape suffixes: T = tokens, O = out features, I = in features, D = the smaller side.
"""

import peft
import pytest
import torch
from torch import nn

from qsvd.adapters import linear
from qsvd.adapters.adapter import AdapterOptions
from qsvd.adapters.linear import SplitLinear
from qsvd.adapters.methods import randlora
from tests import reference
from tests.adapters.principals import UNIT, decoded, principal_of

SHAPES = [(172, 70), (70, 172), (64, 64)]
RANK, TOKENS = 12, 9


def tensor(*shape, seed):
    return torch.from_numpy(reference.gaussian(*shape, seed=seed))


def moved(shape, *, rank=RANK, **options):
    """An adapter after some training, beside components of rank 3."""
    options = AdapterOptions("randlora", rank=rank, alpha=3.0, **options)
    principal = principal_of(shape, 3)
    adapter = randlora.RandLora.start(principal, options, torch.Generator())
    with torch.no_grad():
        adapter.lam += tensor(*adapter.lam.shape, seed=3)
        adapter.gam *= 1 + 0.3 * tensor(*adapter.gam.shape, seed=4)
    return principal, adapter


def added(shape, lam, gam, bases, base):
    """s sum_n B_n diag(lam_n) A diag(gam_n) [O, I], with A and B_n of deviation 1."""
    rank = len(base)
    unit = (3 * base.shape[1]) ** 0.5 * (3 * bases.shape[1]) ** 0.5  # a uniform draw in 1 / sqrt(n) has 1 / sqrt(3 n)
    total = 0
    for number in range(lam.shape[1]):
        part = bases[:, number * rank : (number + 1) * rank]
        total = total + part @ torch.diag(lam[:, number]) @ base @ torch.diag(gam[number])
    total = 3 / rank * unit * total
    return total if shape[0] >= shape[1] else total.T


@pytest.mark.parametrize("piece", [200, randlora.PIECE])
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_are_those_of_the_sum_in_float64(shape, piece, monkeypatch):
    monkeypatch.setattr(randlora, "PIECE", piece)
    _, adapter = moved(shape)
    x, dy = tensor(TOKENS, shape[1], seed=5), tensor(TOKENS, shape[0], seed=6)
    point = x.clone().requires_grad_()
    y = adapter.delta(point)
    y.backward(dy)
    ours = {"y": y.detach(), "x": point.grad, "lam": adapter.lam.grad, "gam": adapter.gam.grad}
    found = []
    for change in (torch.Tensor.double, lambda t: t.double().abs()):
        given = [change(t.detach()).requires_grad_() for t in (x, adapter.lam, adapter.gam)]
        bases, base = (change(adapter.get_buffer(name)) for name in ("shared_bases", "shared_base"))
        result = given[0] @ added(shape, given[1], given[2], bases, base).T
        gradients = torch.autograd.grad(result, given, change(dy))
        found.append(dict(zip(("x", "lam", "gam", "y"), (*gradients, result.detach()), strict=True)))
    exact, sizes = found
    for name, value in exact.items():
        bound = 3 * (sum(shape) + TOKENS) * UNIT[torch.float32] * sizes[name]
        assert ((ours[name].double() - value).abs() <= bound).all(), name
        assert (value.abs() > 10 * bound).any(), f"{name} is so small that its absence would pass"


@pytest.mark.parametrize("shape", SHAPES)
def test_the_delta_and_its_gradients_are_pefts(shape, monkeypatch):
    """PEFT flattens its bases in another order than its inner rows; each column of its B is one of ours anyhow."""
    principal, adapter = moved(shape)
    base = nn.Linear(shape[1], shape[0], bias=False)
    base.weight.data = (decoded(principal.residual) + principal.up_OR.double() @ principal.down_RI.double()).float()
    config = peft.RandLoraConfig(r=RANK, randlora_alpha=3, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(base), config).base_model.model[0]
    inner, bases = adapter.get_buffer("shared_base"), adapter.get_buffer("shared_bases")
    order = [n * RANK + k for k in range(RANK) for n in range(adapter.lam.shape[1])]  # by direction, then by basis
    unit = {"A": (3 * inner.shape[1]) ** 0.5, "B": (3 * bases.shape[1]) ** 0.5}
    theirs.randlora_A["default"] = unit["A"] * inner[:, None]
    theirs.randlora_B["default"] = unit["B"] * bases[:, order].unflatten(1, (-1, RANK))
    assert theirs.randlora_lambda["default"].shape == adapter.lam.shape
    with torch.no_grad():
        theirs.randlora_lambda["default"].copy_(adapter.lam)
        theirs.randlora_gamma["default"].copy_(adapter.gam)
    ours = SplitLinear(principal.residual, adapter, None)
    x, dy = tensor(TOKENS, shape[1], seed=5), tensor(TOKENS, shape[0], seed=6)
    y, expected = ours(x), theirs(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    y.backward(dy)
    expected.backward(dy)
    for mine, name in ((adapter.lam, "lambda"), (adapter.gam, "gamma")):
        other = getattr(theirs, f"randlora_{name}")["default"].grad
        torch.testing.assert_close(mine.grad, other, rtol=0, atol=1e-5 * other.abs().max().item())
    monkeypatch.setattr(linear, "ROWS", 50)
    torch.testing.assert_close(
        ours.weight - base.weight.detach(), theirs.get_delta_weight("default").detach(), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_it_starts_as_in_peft(shape):
    adapter = randlora.RandLora.start(principal_of(shape, 3), AdapterOptions("randlora"), torch.Generator())
    layer = peft.get_peft_model(
        nn.Sequential(nn.Linear(shape[1], shape[0])), peft.RandLoraConfig(target_modules=["0"])
    ).base_model.model[0]
    assert torch.equal(adapter.lam, layer.randlora_lambda["default"])
    assert torch.equal(adapter.gam, layer.randlora_gamma["default"])
    spread = layer.scaling["default"] * layer.randlora_A["default"].std() * layer.randlora_B["default"].std()
    ours = adapter.scale * adapter.get_buffer("shared_bases").std() * adapter.get_buffer("shared_base").std()
    assert ours.item() == pytest.approx(spread.item(), rel=0.05)


@pytest.mark.parametrize("shape", SHAPES)
def test_only_the_input_and_the_parameters_are_kept_for_the_gradient(shape):
    _, adapter = moved(shape)
    x = tensor(TOKENS, shape[1], seed=5).requires_grad_()
    own = {t.untyped_storage().data_ptr() for t in (x, *adapter.parameters(), *adapter.buffers())}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        adapter.delta(x)
    others = [t for t in kept if t.untyped_storage().data_ptr() not in own]
    assert [tuple(t.shape) for t in others] == [tuple(adapter.lam.shape)], "lam times the scale"
    assert any(t.data_ptr() == x.data_ptr() for t in kept)


def test_bfloat16_is_rounded_once_in_each_product():
    _, adapter = moved((172, 70))
    x = tensor(TOKENS, 70, seed=5)
    exact = adapter.delta(x)
    rounded = adapter.delta(x.bfloat16())
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 4 * UNIT[torch.bfloat16] * exact.norm()


def test_layers_of_one_size_share_their_bases_and_another_seed_draws_others():
    (_, first), (_, second), (_, other) = moved((172, 70)), moved((172, 70)), moved((172, 70), seed=1)
    for name in ("shared_bases", "shared_base"):
        assert first.get_buffer(name).data_ptr() == second.get_buffer(name).data_ptr()
        assert not torch.equal(first.get_buffer(name), other.get_buffer(name))
    square = randlora.RandLora.start(principal_of((16, 16), 3), AdapterOptions("randlora", rank=16), torch.Generator())
    assert not torch.equal(square.get_buffer("shared_bases"), square.get_buffer("shared_base"))
