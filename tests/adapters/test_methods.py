"""The methods: what each starts from, trains and refuses. EDoRA's formula has a file of its own."""

import math
import operator

import pytest
import scipy.stats
import torch

from qsvd.adapters.adapter import AdapterOptions
from qsvd.adapters.linear import SplitLinear
from qsvd.adapters.methods import vera
from qsvd.adapters.methods.lora import Lora
from qsvd.adapters.methods.pissa import Pissa
from qsvd.adapters.methods.table import METHODS
from qsvd.adapters.methods.vera import shared_draw
from tests import reference
from tests.adapters.principals import SHAPES, UNIT, decoded, dense_output, even, own_options, principal_of

TRAINED = {
    "pissa": {"up", "down"},
    "lora": {"up", "down"},
    "edora": {"core", "magnitude"},
    "lora-xs": {"core"},
    "sorsa": {"up", "diagonal", "down"},
    "dora": {"up", "down", "magnitude"},
    "adalora": {"up", "diagonal", "down"},
    "lora-fa": {"up"},
    "vera": {"b", "d"},
    "lora-ga": {"up", "down"},
    "randlora": {"lam", "gam"},
    "sara": {"up", "diagonal", "down"},
    "mo-sara": {"cores", "w1", "w2", "v"},
    "r-lora": {"down", "up", "router"},
    "melora": {"up", "down"},
    "kron-lora": {"kron", "up", "down"},
    "singlora": {"down"},
    "symlora": {"down", "diagonal"},
    "lora-mini": {"inner_up", "inner_down"},
    "cora": {"down"},
    "lorta": {"up", "down", "heads", "matrices", "attentions"},
    "lora2": {"up", "inner_up", "diagonal", "inner_down", "down"},
    "delta-lora": {"up", "down"},
    "xgblora": {"up", "down"},
    "weightlora": {"up", "down", "gate"},
    "losa": {"up", "down"},
}
SAVED = {  # besides
    "lora-ga": {"start_up", "start_down"},
    "singlora": {"ramp"},
    "cora": {"basis"},
    "r-lora": {"start_up", "start_down"},
    "delta-lora": {"begun", "begun_up", "begun_down"},
    "xgblora": {"kept_up", "kept_down", "round"},
}
COUNTS = {  # by the papers: how often r^2, r o, r i, r and o, for rank r of an o x i weight; or a formula
    "pissa": (0, 1, 1, 0, 0),
    "lora": (0, 1, 1, 0, 0),
    "edora": (1, 0, 0, 0, 1),
    "lora-xs": (1, 0, 0, 0, 0),
    "sorsa": (0, 1, 1, 1, 0),
    "dora": (0, 1, 1, 0, 1),
    "adalora": (0, 1, 1, 1, 0),
    "lora-fa": (0, 1, 0, 0, 0),
    "vera": (0, 0, 0, 1, 1),
    "lora-ga": (0, 1, 1, 0, 0),
    "randlora": lambda r, o, i: math.ceil(min(o, i) / r) * (r + min(o, i)),
    "sara": (0, 1, 1, 1, 0),
    "mo-sara": lambda r, o, _: 5 * r + r + 5 + o,  # 5 sets or heads
    "r-lora": lambda r, o, i: r * i + 5 * r * o + 5 * i,
    "melora": lambda r, o, i: r * (o + i),
    "kron-lora": lambda r, o, i: even(o) * even(i) + r * (o // even(o) + i // even(i)),
    "singlora": lambda r, o, i: r * max(o, i),
    "symlora": lambda r, o, i: r * (max(o, i) + 1),
    "lora-mini": lambda r, o, i: r * (min(6, o) + min(5, i)),
    "cora": (0, 0, 1, 0, 0),
    "lorta": (0, 1, 1, 6, 0),  # one head of one attention
    "lora2": (2, 1, 1, 1, 0),  # with r as the inner size
    "delta-lora": (0, 1, 1, 0, 0),
    "weightlora": lambda r, o, i: r * (o + i) + 1,
    "losa": (0, 1, 1, 0, 0),
    "xgblora": (0, 1, 1, 0, 0),
}
MOST = {  # ranks that are cut
    "lora-ga": lambda r, o, i: min(r, min(o, i) // 2),
    "melora": lambda r, o, i: min(r, min(o, i) // math.gcd(o, i)),
    "kron-lora": lambda r, o, i: min(r, o // even(o), i // even(i)),
    "lora-mini": lambda r, o, i: min(r, 6, 5, o, i),
    "xgblora": lambda *_: 1,
}
ADDED = {  # beside the components, which are frozen
    "lora",
    "dora",
    "adalora",
    "lora-fa",
    "vera",
    "lora-ga",
    "melora",
    "kron-lora",
    "singlora",
    "symlora",
    "lora-mini",
    "cora",
    "lorta",
    "lora2",
    "sara",
    "delta-lora",
    "weightlora",
    "xgblora",
}
EXACT = [method for method in METHODS if method != "sorsa"]  # it decomposes them once more
SMALL = [(shape, min(3, *shape)) for shape in SHAPES]  # with a rank that each may have


def started(method, principal, *, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    options = {"own": own_options(method, principal.residual.shape), **options}
    return METHODS[method].start(principal, AdapterOptions(method, **options), generator)


def stored_part(method, adapter, rank):
    """Of the factors, the columns and rows that stand for the stored components."""
    up, down = adapter.factors()
    return (up[:, :rank], down[:rank]) if method in ADDED else (up, down)


def test_these_are_the_methods():
    assert set(METHODS) == set(TRAINED) == set(COUNTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "rank"), SMALL)
@pytest.mark.parametrize("method", EXACT)
def test_before_the_first_step_the_factors_are_the_stored_ones_to_the_bit(method, shape, rank, dtype):
    principal = principal_of(shape, rank, dtype=dtype)
    adapter = started(method, principal)
    for ours, stored in zip(stored_part(method, adapter, rank), (principal.up_OR, principal.down_RI), strict=True):
        assert torch.equal(ours.double(), stored.double())
    if method in ADDED:
        up, down = (factor.detach() for factor in adapter.factors())
        assert not (up[:, rank:].any(dim=0) & down[rank:].any(dim=1)).any(), "every product that is added is zero"
    gain = adapter.gain(lambda: principal.residual)
    assert gain is None or (gain == 1).all()


@pytest.mark.parametrize(
    ("method", "adapter_dtype"), [*((method, "float32") for method in METHODS), *((m, "bfloat16") for m in EXACT)]
)
def test_before_the_first_step_the_layer_computes_the_stored_weight(method, adapter_dtype):
    shape, rank, tokens = (70, 172), 4, 9
    principal = principal_of(shape, rank, dtype=torch.bfloat16)  # so that neither adapter dtype rounds
    x = torch.from_numpy(reference.gaussian(tokens, shape[1]))
    ours = SplitLinear(principal.residual, started(method, principal, dtype=adapter_dtype), None)(x).double()
    operands = (x.double(), decoded(principal.residual), principal.up_OR.double(), principal.down_RI.double())
    bound = (sum(shape) + rank) * UNIT[torch.float32] * dense_output(*map(torch.abs, operands))
    assert ((ours - dense_output(*operands)).abs() <= bound).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_lora_starts_from_the_residual_alone_where_no_components_are_stored(shape):
    adapter = started("lora", principal_of(shape, 0), rank=2)
    up, down = adapter.factors()
    assert tuple(up.shape) == (shape[0], min(2, *shape))
    assert torch.equal(up, torch.zeros_like(up))
    assert down is adapter.down


@pytest.mark.parametrize(("shape", "rank"), SMALL)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_trained_is_counted_right_and_all_that_is_saved(method, shape, rank):
    adapter = started(method, principal_of(shape, rank), rank=rank)
    count = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
    trained = MOST.get(method, lambda r, *_: r)(rank, *shape)
    sizes, numbers = (rank * rank, trained * shape[0], trained * shape[1], rank, shape[0]), COUNTS[method]
    is_formula = callable(numbers)
    by_hand = numbers(trained, *shape) if is_formula else sum(map(operator.mul, numbers, sizes))
    own = METHODS[method].options(**own_options(method, shape))
    planned = METHODS[method].tensors_for(own, shape, rank, rank, (torch.float32, torch.float32))
    assert sum(tensor.numel for tensor in planned.trained.values()) == count == by_hand
    assert {name for name, _ in adapter.named_parameters()} == TRAINED[method]
    assert set(adapter.state_dict()) == TRAINED[method] | SAVED.get(method, set())


@pytest.mark.parametrize("method", METHODS)
def test_what_is_frozen_has_no_gradient_and_what_is_trained_has_one(method):
    adapter = started(method, principal_of((33, 64), 3))
    if method == "singlora":
        adapter.ramp.fill_(0.5)  # without hooks it stays at 0, where nothing has a gradient
    module = SplitLinear(principal_of((33, 64), 3).residual, adapter, torch.ones(33))
    frozen = [t.clone() for t in module.buffers()]
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):  # a factor beside zeros has a gradient once they have moved
        optimizer.zero_grad()
        module(torch.from_numpy(reference.gaussian(9, 64))).square().sum().backward()
        optimizer.step()
    assert {name for name, p in module.named_parameters() if p.grad is not None and p.grad.abs().max() > 0} == {
        f"adapter.{name}" for name in TRAINED[method]
    }
    assert all(buffer.grad is None and not buffer.requires_grad for buffer in module.buffers())
    assert all(map(torch.equal, module.buffers(), frozen))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_what_is_trained_has_the_dtype_that_was_asked_for_but_for_magnitudes_and_gates(method, name):
    adapter = started(method, principal_of((33, 64), 3), dtype=name)
    dtypes = {key: str(p.dtype) for key, p in adapter.named_parameters()}
    assert {dtypes.pop(part, "torch.float32") for part in ("magnitude", "gate")} == {"torch.float32"}
    assert set(dtypes.values()) == {f"torch.{name}"}


@pytest.mark.parametrize("method", METHODS)
def test_training_leaves_the_stored_tensors_alone(method):
    principal = principal_of((33, 64), 3)
    before = [t.clone() for t in (principal.up_OR, principal.down_RI)]
    adapter = started(method, principal)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(1)
    assert torch.equal(principal.up_OR, before[0])
    assert torch.equal(principal.down_RI, before[1])


def test_pissa_rounds_float32_factors_once_where_bfloat16_is_asked_for():
    principal = principal_of((33, 64), 3)
    up, down = started("pissa", principal, dtype="bfloat16").factors()
    assert torch.equal(up, principal.up_OR.bfloat16())
    assert torch.equal(down, principal.down_RI.bfloat16())


@pytest.mark.parametrize("shape", [(70, 172), (172, 7)])
def test_loras_down_factor_is_drawn_uniformly_within_kaimings_bound(shape):
    down = torch.cat([started("lora", principal_of(shape, 0), rank=7, seed=seed).down for seed in range(20)])
    bound = math.sqrt(6 / ((1 + 5) * shape[1]))  # He et al. (arXiv:1502.01852), gain of a leaky ReLU of slope sqrt 5
    scaled = down.detach().double().flatten().numpy() / bound
    assert scipy.stats.kstest(scaled, scipy.stats.uniform(-1, 2).cdf).pvalue > 1e-3


def test_loras_draw_repeats_with_its_generator_and_differs_with_another():
    first, again, other = (started("lora", principal_of((33, 64), 2), seed=seed).down for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("at_once", [vera.AT_ONCE, 5])
def test_veras_random_factors_are_what_earlier_runs_were_trained_with(at_once, monkeypatch):
    monkeypatch.setattr(vera, "AT_ONCE", at_once)
    drawn = shared_draw(2, 4, 0, torch.zeros(1)) * 2**24  # a bound of 1/2: integers
    first = [[-5328508, -7302269, -5296228, 1626474], [4486572, -511180, -4257752, -2816422]]
    assert drawn.tolist() == first
    many = shared_draw(300, 200, 7, torch.zeros(1)).double().numpy().flatten() * math.sqrt(200)
    assert scipy.stats.kstest(many, scipy.stats.uniform(-1, 2).cdf).pvalue > 0.01


@pytest.mark.parametrize(
    ("options", "rank", "scale"),
    [
        ({}, 64, 16 / 64),
        ({"rank": 8}, 8, 16 / 64),
        ({"rank": 4, "alpha": 1}, 4, 1 / 4),
        ({"rslora": True}, 64, 16 / 64),
        ({"rslora": True, "rank": 16}, 16, 2 / 4),
        ({"rslora": True, "rank": 4, "alpha": 3}, 4, 3 / 2),
    ],
)
def test_loras_product_is_scaled_and_a_smaller_rank_keeps_the_default_scale(options, rank, scale):
    adapter = started("lora", principal_of((70, 172), 0), **options)
    assert adapter.down.shape[0] == rank
    with torch.no_grad():
        adapter.up.fill_(1)
    up, down = adapter.factors()
    assert torch.equal(up, torch.full((70, rank), scale))
    assert torch.equal(down, adapter.down)


def test_a_rank_above_the_smaller_side_is_cut_and_the_scale_stays():
    adapter = started("lora", principal_of((5, 12), 2), rank=64, alpha=16)
    assert tuple(adapter.up.shape) == (5, 5)
    assert tuple(adapter.down.shape) == (5, 12)
    with torch.no_grad():
        adapter.up.fill_(1)
    assert torch.equal(adapter.factors()[0][:, 2:], torch.full((5, 5), 0.25))


def test_pissa_takes_the_stored_rank_as_rank_and_alpha():
    principal = principal_of((33, 64), 3)
    assert torch.equal(started("pissa", principal, rank=3, alpha=3.0).factors()[0], principal.up_OR)


@pytest.mark.parametrize(
    ("method", "rank", "options", "said"),
    [
        ("pissa", 0, {}, r"pissa trains stored components, and the quantized model has none \(rank 0\); quantize with"),
        ("pissa", 3, {"rank": 2}, "rank 2 is not the stored rank 3, the only one that pissa can train"),
        ("pissa", 3, {"alpha": 0.5}, "alpha 0.5 would scale the stored components; with pissa it is the rank 3"),
        ("edora", 0, {}, r"edora trains stored components, and the quantized model has none \(rank 0\); quantize with"),
        ("edora", 3, {"rank": 4}, r"rank 4 is outside 1\.\.3, the stored components"),
        ("edora", 3, {"rank": 0}, r"rank 0 is outside 1\.\.3"),
        ("lora-xs", 0, {}, r"lora-xs trains stored components, and the quantized model has none"),
        ("sorsa", 0, {}, r"sorsa trains stored components, and the quantized model has none"),
        ("sorsa", 3, {"rank": 2}, "rank 2 is not the stored rank 3, the only one that sorsa can train"),
        (
            "sara",
            0,
            {},
            r"sara takes the rank of each layer from its stored components, and the quantized model has none",
        ),
        ("mo-sara", 0, {}, r"mo-sara trains stored components, and the quantized model has none"),
        ("mo-sara", 3, {"rank": 4}, r"rank 4 is outside 1\.\.3, the stored components"),
        ("r-lora", 3, {"rank": 0}, "rank 0 is below 1, the least that trains anything"),
        ("randlora", 0, {"rank": 0}, "rank 0 is below 1, the least that trains anything"),
        ("vera", 3, {"alpha": 2.0}, "alpha 2 has no use in vera, whose vectors are its scale: leave it out"),
        ("adalora", 3, {"rank": 4, "own": {"target_rank": 5}}, "target_rank 5 is above the rank 4"),
        ("melora", 3, {"own": {"blocks": 2}}, r"melora: --blocks 2 does not divide both sides of 1 of 1 layers"),
        (
            "cora",
            0,
            {},
            r"cora takes its bases from the stored components, and the layers to train have none \(rank 0\)",
        ),
        ("cora", 3, {"rank": 0}, "rank 0 is below 1"),
        ("lorta", 3, {"rank": 0}, "rank 0 is below 1"),
        ("lora2", 3, {"rank": 4, "own": {"target_rank": 5}}, "target_rank 5 is above the rank 4"),
        ("lora", 3, {"rank": 0}, "rank 0 is below 1, the least that trains anything"),
        ("lora", 0, {"rank": -1}, "rank -1 is below 1"),
    ],
)
def test_what_a_method_cannot_start_from_is_refused(method, rank, options, said):
    with pytest.raises(ValueError, match=said):
        started(method, principal_of((33, 64), rank), **options)


def test_each_default_names_its_reason_and_loras_are_qloras():
    for method in METHODS.values():
        assert len(method.defaults.reason) > 20
    assert (Lora.defaults.rank, Lora.defaults.scale, Lora.defaults.learning_rate) == (64, 16 / 64, 2e-4)  # QLoRA's
    assert (Pissa.defaults.rank, Pissa.defaults.learning_rate) == (None, 2e-5)  # PiSSA's scripts
