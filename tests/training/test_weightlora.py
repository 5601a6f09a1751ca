"""WeightLoRA: gates and choices by hand, growth by the formula in float64, and the layers that exports leave out."""

import json

import pytest
import safetensors.torch
import torch

import qsvd
from qsvd.adapters.adapter import AdapterOptions
from qsvd.adapters.methods.hooks import Course
from qsvd.adapters.methods.table import METHODS
from qsvd.adapters.model import split_linears
from qsvd.errors import BadInput
from tests import reference
from tests.adapters.principals import UNIT, principal_of
from tests.export.cases import make_base
from tests.runs import sequences, settings, trainer

ROWS, COLUMNS = 40, 24
GATES = {"a": 0.5, "b": -1.5, "c": 0.25, "d": 1.25}  # after the first step
RATE = 2.0


def hooks_of(sizes, forgotten=None, **own):
    """Hooks over adapters with these ranks, whose B has moved; `forgotten` gets what the optimizer is to forget."""
    forgotten = [] if forgotten is None else forgotten
    adapters = {}
    for number, (name, rank) in enumerate(sizes.items()):
        options = AdapterOptions("weightlora", rank=rank, own={"gate_rate": RATE, **own})
        generator = torch.Generator().manual_seed(number)
        adapters[name] = METHODS["weightlora"].start(principal_of((ROWS, COLUMNS), 0), options, generator)
        used = adapters[name].down.any(dim=1)
        with torch.no_grad():
            adapters[name].up += torch.from_numpy(reference.gaussian(ROWS, rank, seed=number)) * used
    return METHODS["weightlora"].hooks(adapters, Course(9, 1e-3, forgotten.extend)), adapters


def step(hooks, adapters, number, targets):
    """One step of an optimizer that moves whatever has a gradient, where these gates are to come out."""
    for name, adapter in adapters.items():
        adapter.gate.grad = (adapter.gate.detach() - targets.get(name, 3.0)) / RATE
        adapter.up.grad, adapter.down.grad = torch.ones_like(adapter.up), torch.ones_like(adapter.down)
    hooks.transform_grads(number)
    with torch.no_grad():
        for adapter in adapters.values():
            assert not adapter.gate.grad.any()
            adapter.gate.mul_(0.9)  # weight decay
            for factor in (adapter.up, adapter.down):
                if factor.grad is not None:
                    factor[: adapter.rank_in_use()] -= 0.1
    hooks.after_step(number)


def values(adapters):
    return {name: pytest.approx(adapter.gate.item()) for name, adapter in adapters.items()}


def test_gates_move_by_plain_sgd_and_the_largest_by_magnitude_are_kept_for_good():
    hooks, adapters = hooks_of(dict.fromkeys("abcd", 3), keep_layers=2, gate_every=2)
    step(hooks, adapters, 1, GATES)
    assert values(adapters) == GATES, "nothing is chosen before --gate-every steps"
    step(hooks, adapters, 2, GATES)
    kept = {"a": 0.0, "b": -1.5, "c": 0.0, "d": 1.25}
    assert values(adapters) == kept
    downs = {name: adapter.down.clone() for name, adapter in adapters.items()}
    step(hooks, adapters, 3, {})  # all gates are drawn to 3
    assert values(adapters) == {"a": 0, "b": 3, "c": 0, "d": 3}
    assert {name: bool(adapter.up.any()) for name, adapter in adapters.items()} == {n: n in "bd" for n in "abcd"}
    assert {name for name, down in downs.items() if torch.equal(down, adapters[name].down)} == {"a", "c"}
    again = METHODS["weightlora"].hooks(adapters, Course(9, 1e-3))
    step(again, adapters, 4, GATES)
    assert values(adapters) == kept, "new hooks, as of a resumed run, read from the gates what was dropped"


def test_a_choice_waits_until_gates_differ_and_half_of_the_layers_are_the_default():
    hooks, adapters = hooks_of(dict.fromkeys("abc", 3), gate_every=1)
    step(hooks, adapters, 1, dict.fromkeys("abc", 1.0))
    assert values(adapters) == dict.fromkeys("abc", 1)
    step(hooks, adapters, 2, GATES)
    assert values(adapters) == {"a": 0.5, "b": -1.5, "c": 0}


def test_growth_doubles_the_rank_and_keeps_the_product():
    sizes = {"a": 8, "b": 8, "c": 8, "d": 6}
    hooks, adapters = hooks_of(sizes, forgotten := [], grow=2, gate_every=1)
    assert hooks.ranks == {"a": 2, "b": 2, "c": 2, "d": 1}
    assert [adapter.rank_in_use() for adapter in adapters.values()] == [2, 2, 2, 1]
    for number, ranks in ((1, {"b": 4, "d": 2}), (2, {"b": 8})):
        step(hooks, adapters, 10, {})  # nothing is chosen: all gates are alike
        before = {name: (adapter.up.double(), adapter.down.double()) for name, adapter in adapters.items()}
        hooks.transform_grads(number)
        with torch.no_grad():
            for name, gate in GATES.items():
                hooks.moved[name].fill_(gate if name in hooks.active else 0)
        forgotten.clear()
        hooks.after_step(number)
        assert hooks.ranks == ranks
        assert [name for name, adapter in adapters.items() if adapter.gate] == [*ranks]
        assert {*map(id, forgotten)} == {id(p) for n in ranks for p in (adapters[n].up, adapters[n].down)}
        for name, rank in ranks.items():
            up, down = (factor.detach().double() for factor in (adapters[name].up, adapters[name].down))
            (old_up, old_down), half = before[name], rank // 2
            bound = 8 * rank * UNIT[torch.float32] * (old_up.abs() @ old_down.abs()).max()
            assert (up @ down - old_up @ old_down).abs().max() <= bound
            torch.testing.assert_close(down[:half] @ down[:half].T, torch.eye(half).double(), rtol=0, atol=1e-6)
            torch.testing.assert_close(
                down[half:rank] @ down[:half].T, torch.zeros(half, half).double(), atol=1e-6, rtol=0
            )
            assert torch.linalg.matrix_rank(down) == rank
            assert not up[:, half:].any()
            assert not down[rank:].any()
            assert len(adapters[name].exported()[1]) == rank
    step(hooks, adapters, 3, GATES)
    assert values(adapters)["b"] == -1.5, "gates rest after the last growth"


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"grow": 1, "keep_layers": 2}, "keep_layers has no use with grow, which halves the layers: give one of both"),
        ({"grow": 3}, r"rank 4 cannot be the double of another 3 times \(grow\); give rank 8 or more"),
    ],
)
def test_what_growth_cannot_start_from_is_refused(own, said):
    with pytest.raises(BadInput, match=said):
        hooks_of({"a": 4}, **own)


def test_the_optimizer_forgets_what_was_replaced(language, tmp_path):
    options = AdapterOptions("weightlora", rank=4, own={"gate_every": 2, "grow": 1})
    made = trainer(language, tmp_path, sequences(), settings(steps=3, epochs=3.0), options=options)
    made.train()
    counts = {}
    for _, linear in split_linears(made.model):
        adapter = linear.adapter
        state = made.optimizer.state
        counts.setdefault(bool(adapter.gate), set()).update(int(state[p]["step"]) for p in (adapter.up, adapter.down))
    assert counts == {True: {1}, False: {2}}  # since the growth; until the layer was dropped


def test_exports_leave_out_the_layers_whose_gates_are_zero(tmp_path):
    base = make_base(tmp_path, rank=0) / "out"
    model = qsvd.load(base, options=AdapterOptions("weightlora", rank=3))
    paths = []
    with torch.no_grad():
        for number, (path, linear) in enumerate(split_linears(model)):
            linear.adapter.up.fill_(0.01)
            if number % 3:
                linear.adapter.gate.zero_()
            else:
                paths.append(path)
    model.save_pretrained(tmp_path / "run")
    for form in ("peft", "lora"):
        qsvd.export(tmp_path / "run", to=form, out=tmp_path / form)  # compares with PEFT's logits
        config = json.loads((tmp_path / form / "adapter_config.json").read_text())
        assert sorted(config["target_modules"]) == sorted(paths)
        written = safetensors.torch.load_file(tmp_path / form / "adapter_model.safetensors")
        assert len(written) == 2 * len(paths)
