"""Mo-SARA and R-LoRA: outputs and gradients by their formulas in float64, token by token, and no weight of theirs.

Shape suffixes: T = tokens, O = out features, I = in features, K = trained rank, N = heads or sets.
"""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import qsvd
from qsvd.adapters.adapter import AdapterOptions
from qsvd.adapters.linear import SplitLinear, dense_delta
from qsvd.adapters.methods.table import METHODS, export_refusal
from tests import reference
from tests.adapters.principals import decoded, principal_of

SHAPE, STORED, RANK, TOKENS, SETS = (70, 172), 4, 3, 9, 3
OPTIONS = {"mo-sara": {"cores": SETS}, "r-lora": {"heads": SETS}}
NEAR = 1e-5  # of the largest number: float32 sums of a few hundred terms, and a softmax of them
P = 0.3


def tensor(*shape, seed):
    return torch.from_numpy(reference.gaussian(*shape, seed=seed))


def moved(method, *, dropout=0.0, dtype="float32"):
    """A layer after some training, with a bias."""
    principal = principal_of(SHAPE, STORED)
    options = AdapterOptions(method, rank=RANK, alpha=6.0, dropout=dropout, dtype=dtype, own=OPTIONS[method])
    adapter = METHODS[method].start(principal, options, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for number, parameter in enumerate(adapter.parameters()):
            step = tensor(1, parameter.numel(), seed=number).reshape(parameter.shape)
            parameter += 0.3 * step * (parameter.abs().mean() or 0.3)
    return principal, SplitLinear(principal.residual, adapter, torch.linspace(-1, 1, SHAPE[0])).train()


def formula(method, f, p, x, masks):
    """The output of one token in float64; masks [N, K] are those of dropout."""
    if method == "mo-sara":
        u, v = f["left"], f["right"]
        shares = torch.softmax(p["w2"] * (p["w1"] @ (v @ x)), dim=0)
        values = sum(share * core for share, core in zip(shares, p["cores"], strict=True))
        core = 6 / RANK * (u @ torch.diag(values) @ v)
        return torch.diag(1 + p["v"]) @ (f["W"] + core) @ x + f["bias"]
    shares = torch.softmax(p["router"] @ x, dim=0)
    heads = p["up"].split(RANK, dim=1)
    mixed = sum(g * (head @ (m * (p["down"] @ x))) for g, head, m in zip(shares, heads, masks, strict=True))
    return f["W"] @ x + 6 / RANK * (mixed - f["start_up"] @ f["start_down"] @ x) + f["bias"]


def expected(method, principal, module, x, dy, masks):
    """Output, and gradients by autograd."""
    adapter = module.adapter
    frozen = {name: buffer.double() for name, buffer in adapter.named_buffers()}
    frozen["W"] = decoded(principal.residual) + principal.up_OR.double() @ principal.down_RI.double()
    frozen["bias"] = module.bias.double()
    given = {name: p.detach().double().requires_grad_() for name, p in adapter.named_parameters()}
    given["x"] = x.double().requires_grad_()
    rows = [formula(method, frozen, given, token, masks[n]) for n, token in enumerate(given["x"])]
    y = torch.stack(rows)
    return y.detach(), dict(zip(given, torch.autograd.grad(y, [*given.values()], dy.double()), strict=True))


def run(module, x, dy, call=None):
    """Output, and gradients by name."""
    module.zero_grad()
    point = x.clone().requires_grad_()
    y = (call or module)(point)
    y.backward(dy)
    return y.detach(), {n: p.grad.clone() for n, p in module.adapter.named_parameters()} | {"x": point.grad}


def assert_near(found, exact):
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=NEAR * exact.abs().max().item())
    assert exact.abs().max() > 1e-3, "it would be missed"


def test_these_are_the_routed_methods():
    assert {name for name, kind in METHODS.items() if kind.is_routed} == set(OPTIONS)


@pytest.mark.parametrize(("method", "dropout"), [("mo-sara", 0.0), ("r-lora", 0.0), ("r-lora", P)])
def test_outputs_and_gradients_are_those_of_the_formula_in_float64(method, dropout):
    principal, module = moved(method, dropout=dropout)
    x, dy = tensor(TOKENS, SHAPE[1], seed=5), tensor(TOKENS, SHAPE[0], seed=6)
    torch.manual_seed(8)
    y, gradients = run(module, x, dy)
    torch.manual_seed(8)
    masks = torch.nn.functional.dropout(torch.ones(TOKENS, SETS, RANK), dropout).double()
    exact, exact_gradients = expected(method, principal, module, x, dy, masks)
    assert_near(y, exact)
    for name, gradient in exact_gradients.items():
        assert_near(gradients[name], gradient)
    if dropout:
        assert not torch.equal(masks[:, 0], masks[:, 1]), "each head has draws of its own"
        ones = torch.ones_like(masks)
        assert_near(module.eval()(x).detach(), expected(method, principal, module, x, dy, ones)[0])


@pytest.mark.parametrize("method", OPTIONS)
def test_a_checkpointed_layer_repeats_it_to_the_bit(method):
    _, module = moved(method, dropout=P * (method == "r-lora"))
    x, dy = tensor(TOKENS, SHAPE[1], seed=5), tensor(TOKENS, SHAPE[0], seed=6)
    torch.manual_seed(8)
    plain, gradients = run(module, x, dy)
    torch.manual_seed(8)
    again, repeated = run(module, x, dy, lambda point: checkpoint(module, point, use_reentrant=False))
    assert torch.equal(plain, again)
    assert all(torch.equal(gradients[name], repeated[name]) for name in gradients)


@pytest.mark.parametrize("adapter_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", OPTIONS)
def test_a_bfloat16_model_computes_it_in_bfloat16(method, adapter_dtype):
    _, module = moved(method, dtype=adapter_dtype)
    module.bias = None
    x, dy = tensor(TOKENS, SHAPE[1], seed=5), tensor(TOKENS, SHAPE[0], seed=6)
    exact, exact_gradients = run(module, x, dy)
    y, gradients = run(module, x.bfloat16(), dy.bfloat16())
    assert y.dtype == gradients["x"].dtype == torch.bfloat16
    for name, found in {"y": y, **gradients}.items():
        wanted = exact if name == "y" else exact_gradients[name]
        assert (found.float() - wanted.float()).norm() < 0.02 * wanted.float().norm(), name


def test_r_lora_starts_from_drawn_heads_whose_mean_is_subtracted():
    """The deviations are those of the authors' code, with each factor once."""
    shape, rank, heads = (200, 300), 16, 5
    principal = principal_of(shape, 0)
    adapter = METHODS["r-lora"].start(principal, AdapterOptions("r-lora", rank=rank), torch.Generator().manual_seed(1))
    stable = rank**0.25 / 64**0.5
    assert adapter.down.std().item() == pytest.approx(stable / shape[1] ** 0.5, rel=0.05)
    assert adapter.up.std().item() == pytest.approx(stable / shape[0] ** 0.5, rel=0.05)
    assert not adapter.router.any()
    assert not torch.equal(adapter.up[:, :rank], adapter.up[:, rank : 2 * rank])
    mean = sum(head.double() for head in adapter.up.detach().split(rank, dim=1)) / heads
    torch.testing.assert_close(adapter.start_up.double(), mean, rtol=0, atol=1e-8)
    assert torch.equal(adapter.start_down, adapter.down)
    x = tensor(TOKENS, shape[1], seed=5)
    added = adapter.scale * x.double() @ adapter.down.double().T @ mean.T
    assert adapter.delta(x).abs().max() < 1e-5 * added.abs().max(), "the mean of the heads is gone"


@pytest.mark.parametrize("method", OPTIONS)
def test_what_depends_on_the_input_has_no_weight_and_no_export(method):
    _, module = moved(method)
    weight = module.weight
    assert tuple(weight.shape) == SHAPE
    assert weight.dtype == torch.float32
    assert weight.device.type == "cpu"
    said = "a router adds to this layer what depends on its input, so that it has no weight"
    for read in (
        lambda: weight @ torch.ones(SHAPE[1]),
        weight.sum,
        weight.tolist,
        lambda: weight[0],
        lambda: weight.data,
    ):
        with pytest.raises(qsvd.BadInput, match=said):
            read()
    with pytest.raises(qsvd.BadInput, match=said):
        dense_delta(module.adapter, SHAPE[1], torch.device("cpu"))
    refusals = [export_refusal(method, form) for form in ("peft", "lora", "merged")]
    assert all(f"{method} adds to each token what a router chooses by its input" in str(one) for one in refusals)
    assert len(set(refusals)) == 3
