"""Every method against its formula: the dense weight in float64, and autograd's gradients of it.

Shape suffixes: T = tokens, O = out features, I = in features, R = stored rank, K = trained rank.
"""

import pytest
import torch
from torch import nn

from qsvd.adapters.adapter import AdapterOptions
from qsvd.adapters.linear import SplitLinear
from qsvd.adapters.methods.hooks import Course
from qsvd.adapters.methods.orthonormal import orthonormal_gradient
from qsvd.adapters.methods.table import METHODS, export_refusal
from tests import reference
from tests.adapters.principals import UNIT, Given, decoded, principal_of

SHAPE, RANK, TOKENS = (70, 172), 4, 9
OPTIONS = {  # a scale of 3 / rank, where there is one
    "pissa": {},
    "lora": {"rank": 5, "alpha": 3.0},
    "edora": {"rank": 3, "alpha": 3.0},
    "lora-xs": {"rank": 3, "alpha": 3.0},
    "sorsa": {},
    "dora": {"rank": 5, "alpha": 3.0},
    "adalora": {"rank": 5, "alpha": 3.0},
    "lora-fa": {"rank": 5, "alpha": 3.0},
    "vera": {"rank": 5, "own": {"d_initial": 0.7}},
    "lora-ga": {"rank": 5, "alpha": 3.0, "own": {"gamma": 4.0}},
    "randlora": {"rank": 32, "alpha": 3.0},
    "sara": {"rank": 5, "alpha": 3.0},
    "melora": {"rank": 5, "alpha": 3.0, "own": {"blocks": 2}},
    "kron-lora": {"rank": 5, "alpha": 3.0, "own": {"kron_out": 7, "kron_in": 4}},
    "singlora": {"rank": 5, "alpha": 3.0},
    "symlora": {"rank": 5, "alpha": 3.0},
    "lora-mini": {"rank": 5, "alpha": 3.0, "own": {"outer_out": 8, "outer_in": 6}},
    "cora": {"rank": 3, "alpha": 3.0},
    "lorta": {"rank": 5, "alpha": 3.0},
    "lora2": {"rank": 5, "alpha": 3.0, "own": {"inner_size": 4}},
    "delta-lora": {"rank": 5, "alpha": 3.0, "own": {"delta_ratio": 0.5, "delta_start": 0.0}},
    "xgblora": {"rank": 5, "alpha": 3.0},
    "weightlora": {"rank": 5, "alpha": 3.0},
    "losa": {"rank": 5, "alpha": 3.0},
}
RAMP = 0.375  # of singlora, exact in binary


def block_diagonal(up, down, count):
    """The products of `count` slices of the rows of B and the columns of A, on the diagonal."""
    product, (height, width) = torch.zeros_like(up @ down), (len(up) // count, down.shape[1] // count)
    for one in range(count):
        rows, columns = (slice(one * side, (one + 1) * side) for side in (height, width))
        product[rows, columns] = up[rows] @ down[:, columns]
    return product


def mirrored(columns, values):
    """D [K, M] on both sides of values: O rows of its transpose, and I of its columns."""
    rows, width = SHAPE
    return columns[:, :rows].T @ torch.diag(values) @ columns[:, :width]


def of_random_bases(f, p):
    """The sum of B_n diag(lam_n) A diag(gam_n); a uniform draw within 1 / sqrt(n) has the deviation 1 / sqrt(3 n)."""
    bases, base = f["shared_bases"], f["shared_base"]
    parts = zip(bases.split(len(base), dim=1), p["lam"].T, p["gam"], strict=True)
    total = sum(part @ torch.diag(lam) @ base @ torch.diag(gam) for part, lam, gam in parts)
    return 3 * (bases.shape[1] * base.shape[1]) ** 0.5 * total.T


BY_FORMULA = {  # without the scale
    "adalora": lambda _, p: p["up"] @ torch.diag(p["diagonal"]) @ p["down"],
    "sara": lambda _, p: p["up"] @ torch.diag(p["diagonal"]) @ p["down"],
    "lora-ga": lambda f, p: p["up"] @ p["down"] + f["minus_start_up"] @ f["start_down"],
    "randlora": of_random_bases,
    "melora": lambda _, p: block_diagonal(p["up"], p["down"], 2),
    "kron-lora": lambda _, p: torch.kron(p["kron"], p["up"] @ p["down"]),
    "singlora": lambda _, p: RAMP * mirrored(p["down"], torch.ones(5).double()),
    "symlora": lambda _, p: mirrored(p["down"], p["diagonal"]),
    "lora-mini": lambda f, p: f["outer_up"] @ p["inner_up"] @ p["inner_down"] @ f["frozen_down"][RANK:],
    "cora": lambda f, p: f["basis"] @ p["down"],
    "lorta": lambda _, p: (  # one head of the first projection of one attention
        p["up"] @ torch.diag(p["heads"][0] * p["matrices"][0] * p["attentions"][0]) @ p["down"]
    ),
    "lora2": lambda _, p: p["up"] @ p["inner_up"] @ torch.diag(p["diagonal"]) @ p["inner_down"] @ p["down"],
}
ROUTED = ("mo-sara", "r-lora")  # their outputs are no product with a dense weight: see test_routed.py

BESIDE = {"delta-lora": ("begun_up", "begun_down"), "xgblora": ("kept_up", "kept_down")}  # zero at the start


def formula(method, scale, f, p):
    """W' before magnitudes; f has frozen tensors, p the trained parameters, scale is alpha / K."""
    if method == "pissa":
        return f["Q"] + p["up"] @ p["down"]
    if method == "sorsa":
        return f["Q"] + p["up"] @ torch.diag(p["diagonal"]) @ p["down"]
    if method in ("lora-xs", "edora"):
        return f["Q"] + f["P"] + scale * f["directions"] @ p["core"] @ f["directions"].T @ f["P"]
    if method == "vera":
        added = p["b"][:, None] * (f["shared_up"] @ torch.diag(p["d"]) @ f["shared_down"])
    elif method in BY_FORMULA:
        added = scale * BY_FORMULA[method](f, p)
    elif method in BESIDE:
        added = beside(method, scale, f, p)
    else:
        product = p["up"] @ (f["frozen_down"][RANK:] if method == "lora-fa" else p["down"])
        added = scale * p.get("gate", 1) * product * f["kept"]
    return f["Q"] + f["P"] + added


def beside(method, scale, f, p):
    """B A with buffers beside the trained factors."""
    if method == "delta-lora":  # the second part moves the weight, which has no gradient
        product = p["up"] @ p["down"] + 0.5 * p["up"].detach() @ p["down"].detach()
        return scale * (product + 0.5 * f["minus_start_up"] @ f["start_down"])
    return f["kept_up"] @ f["kept_down"] + scale * p["up"] @ p["down"]


def moved(method, principal, *, seed=3):
    """An adapter after some training, and alpha / rank."""
    options = AdapterOptions(method, **OPTIONS[method])
    adapter = METHODS[method].start(principal, options, torch.Generator().manual_seed(0))
    with torch.no_grad():
        if method == "singlora":
            adapter.ramp.fill_(RAMP)
        for number, parameter in enumerate(adapter.parameters()):
            step = torch.from_numpy(reference.gaussian(1, parameter.numel(), seed=seed + number)).reshape(
                parameter.shape
            )
            parameter += 0.3 * step * (parameter.abs().mean() or 0.5)
        for number, name in enumerate(BESIDE.get(method, ())):
            buffer = adapter.get_buffer(name)
            buffer += torch.from_numpy(reference.gaussian(*buffer.shape, seed=number))
    return adapter, 3 / OPTIONS[method].get("rank", 1)


def frozen_of(adapter, principal):
    buffers = {name: buffer.double() for name, buffer in adapter.named_buffers()}
    if "begun_up" in buffers:
        buffers |= {"start_up": buffers["begun_up"], "start_down": buffers["begun_down"]}
    if "start_up" in buffers:
        buffers["minus_start_up"] = -buffers["start_up"]  # so that a formula of absolute values adds it
    residual = decoded(principal.residual)
    kept = residual != 0 if "mask" in buffers else torch.ones(())  # losa
    return buffers | {"Q": residual, "kept": kept, "P": principal.up_OR.double() @ principal.down_RI.double()}


def dense(method, scale, frozen, parameters, norms):
    weight = formula(method, scale, frozen, parameters)
    return weight if "magnitude" not in parameters else parameters["magnitude"][:, None] * weight / norms[:, None]


def test_each_method_has_a_formula():
    assert {*OPTIONS, *ROUTED} == set(METHODS)


@pytest.mark.parametrize("method", OPTIONS)
def test_outputs_and_gradients_are_those_of_the_dense_formula_in_float64(method):
    """The bound is a count of float32 roundings, times the same formula of absolute values."""
    principal = principal_of(SHAPE, RANK)
    adapter, scale = moved(method, principal)
    module = SplitLinear(principal.residual, adapter, None).train()
    x, dy = (torch.from_numpy(reference.gaussian(TOKENS, side, seed=side)) for side in reversed(SHAPE))
    inputs = x.clone().requires_grad_()
    outputs = module(inputs)
    outputs.backward(dy)
    frozen = frozen_of(adapter, principal)
    exact, sizes = {}, {}
    norms = None
    for found, change in ((exact, torch.Tensor.double), (sizes, lambda tensor: tensor.double().abs())):
        parameters = {n: change(p.detach()).requires_grad_() for n, p in adapter.named_parameters()}
        tensors = {name: change(tensor) for name, tensor in frozen.items()}
        if norms is None:  # held fixed, as in the paper
            norms = formula(method, scale, tensors, parameters).detach().norm(dim=1)
        point = change(x).requires_grad_()
        result = point @ dense(method, scale, tensors, parameters, norms).T
        names = [*parameters, "x"]
        gradients = torch.autograd.grad(result, [*parameters.values(), point], change(dy))
        found.update(dict(zip(names, gradients, strict=True)), y=result.detach())
    ours = {name: p.grad for name, p in adapter.named_parameters()} | {"x": inputs.grad, "y": outputs.detach()}
    roundings = 3 * (sum(SHAPE) + TOKENS + 2 * RANK)
    for name, value in exact.items():
        bound = roundings * UNIT[torch.float32] * sizes[name]
        assert ((ours[name].double() - value).abs() <= bound).all(), name
        assert (value.abs() > 10 * bound).any(), f"{name} is so small that its absence would pass"
    assert (
        module.weight.double()
        - dense(method, scale, frozen, {n: p.detach().double() for n, p in adapter.named_parameters()}, norms)
    ).norm() < 1e-4


@pytest.mark.parametrize("shape", [(3, 40), (7, 7), (1, 5)])
def test_the_orthonormality_gradient_is_autograds(shape):
    rows = torch.from_numpy(reference.gaussian(*shape, seed=1))
    exact = rows.double().requires_grad_()
    torch.linalg.matrix_norm(exact @ exact.T - torch.eye(shape[0])).backward()
    torch.testing.assert_close(orthonormal_gradient(rows).double(), exact.grad, rtol=1e-5, atol=1e-5)


def test_the_orthonormality_gradient_of_orthonormal_rows_is_zero_and_finite():
    assert torch.equal(orthonormal_gradient(torch.eye(3, 5)), torch.zeros(3, 5))


def test_sorsas_loss_is_gamma_over_the_highest_rate_times_the_mean_over_all_factors():
    adapters = {name: moved("sorsa", principal_of(SHAPE, RANK), seed=seed)[0] for name, seed in (("a", 3), ("b", 9))}
    factors = [part for adapter in adapters.values() for part in (adapter.up, adapter.down)]
    for factor in factors:
        factor.grad = torch.ones_like(factor)
    METHODS["sorsa"].hooks(adapters, Course(steps=9, learning_rate=1e-2)).transform_grads(1)
    exact = [factor.detach().double().requires_grad_() for factor in factors]
    grams = [p @ p.T if p.shape[0] == RANK else p.T @ p for p in exact]
    norms = [torch.linalg.matrix_norm(gram - torch.eye(RANK)) for gram in grams]
    (4e-4 / 1e-2 * sum(norms) / len(norms)).backward()
    for factor, point in zip(factors, exact, strict=True):
        torch.testing.assert_close(factor.grad.double(), 1 + point.grad, rtol=0, atol=1e-6)
        assert point.grad.abs().max() > 1e-3


def test_doras_norms_follow_the_factors_in_every_forward_pass_without_hooks():
    """Trainers of others call no hooks, and optimizers that write past autograd leave no trace."""
    principal = principal_of(SHAPE, RANK)
    adapter, scale = moved("dora", principal)
    module, x = SplitLinear(principal.residual, adapter, None).train(), torch.ones(1, SHAPE[1])
    for _ in range(2):
        parameters = {name: p.detach().double() for name, p in adapter.named_parameters()}
        frozen = frozen_of(adapter, principal)
        norms = formula("dora", scale, frozen, parameters).norm(dim=1)
        exact = x.double() @ dense("dora", scale, frozen, parameters, norms).T
        torch.testing.assert_close(module(x).double(), exact, rtol=1e-4, atol=1e-4)
        adapter.up.data.mul_(3)


class WithDelta(Given):
    """Factors and a gain, and a full matrix beside them."""

    def __init__(self):
        super().__init__(SHAPE, RANK, has_gain=True)
        self.matrix = nn.Parameter(torch.from_numpy(reference.gaussian(*SHAPE, seed=7)))

    def delta(self, x_TI):
        return x_TI @ self.matrix.T


def test_peft_has_no_export_of_a_part_that_is_no_product(monkeypatch):
    monkeypatch.setitem(METHODS, "given", WithDelta)
    assert export_refusal("given", "merged") is None
    for form in ("peft", "lora"):
        assert "given trains a part that is no product of two factors" in str(export_refusal("given", form))
        assert export_refusal("lora", form) is None


def test_a_part_that_is_no_product_is_added_to_output_gradient_and_weight():
    residual, adapter = principal_of(SHAPE, RANK).residual, WithDelta()
    module = SplitLinear(residual, adapter, None)
    x, dy = (torch.from_numpy(reference.gaussian(TOKENS, side, seed=side)) for side in reversed(SHAPE))
    module(x).backward(dy)
    up, down, gain, matrix = (p.detach().double() for p in (adapter.up, adapter.down, adapter.factor, adapter.matrix))
    weight = gain[:, None] * (decoded(residual) + up @ down) + matrix
    torch.testing.assert_close(module(x).detach().double(), x.double() @ weight.T, rtol=0, atol=1e-3)
    torch.testing.assert_close(module.weight.double(), weight, rtol=0, atol=1e-4)
    torch.testing.assert_close(adapter.matrix.grad.double(), dy.double().T @ x.double(), rtol=0, atol=1e-4)
