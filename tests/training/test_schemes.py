"""Methods that change tensors between steps: Delta-LoRA, FedSVD's new factors, XGBLoRA. Judged in float64."""

import numpy as np
import pytest
import torch

from qsvd.adapters.adapter import AdapterOptions, StoredWeight
from qsvd.adapters.methods.hooks import Course
from qsvd.adapters.methods.table import METHODS
from qsvd.training.settings import forget
from tests import reference
from tests.adapters.principals import packed_residual

OUT, IN, STORED, RANK = 12, 10, 2, 3
ROUNDOFF = 2.0**-24 * 64  # of float32, over products of some ten numbers


def started(method, *, name="w", stored=STORED, **options):
    """An adapter of a small weight, and its components."""
    residual = packed_residual((OUT, IN))
    up, down = (numbers(number, *size) for number, size in enumerate(((OUT, stored), (stored, IN))))
    weight = StoredWeight(residual, torch.from_numpy(up), torch.from_numpy(down), name)
    options = AdapterOptions(method, **{"rank": RANK, "alpha": 1.5} | options)
    return METHODS[method].start(weight, options, torch.Generator().manual_seed(0))


def numbers(seed, *shape):
    return reference.gaussian(*shape, seed=seed)


def product(adapter):
    """What stands beside Q, float64."""
    up, down = (factor.detach().double().numpy() for factor in adapter.factors())
    return up @ down


def gradient_of(seed, dense):
    """Of |x W^T - y|^2 / 2 at a weight, for batches that change from step to step."""
    x, y = numbers(2 * seed, 5, IN).astype(dense.dtype), numbers(2 * seed + 1, 5, OUT).astype(dense.dtype)
    return (x @ dense.T - y).T @ x


def step_of(adapter, optimizer, seed):
    """One step of the optimizer."""
    optimizer.zero_grad()
    up, down = adapter.factors()
    dense = torch.from_numpy(gradient_of(seed, (up @ down).detach().numpy()))
    (dense * (up @ down)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("start", [0.0, 0.4])  # of 5 steps: 0 and 2
def test_delta_lora_is_a_loop_that_moves_the_weight_itself(start):
    """The loop of the paper's algorithm 1, by SGD: the weight moves by lambda s times the change of B A."""
    ratio, scale, rate = 0.7, 1.5 / RANK, 1e-2
    own = {"delta_ratio": ratio, "delta_start": start}
    adapter = started("delta-lora", own=own)
    first = product(adapter)  # of the frozen components
    weight, up, down = first.copy(), *(p.detach().double().numpy() for p in (adapter.up, adapter.down))
    hooks = METHODS["delta-lora"].hooks({"a": adapter}, Course(5, rate))
    optimizer = torch.optim.SGD(adapter.parameters(), lr=rate)
    for step in range(1, 6):
        gradient = gradient_of(step, weight + scale * up @ down)
        before, moved = up @ down, (up - rate * scale * gradient @ down.T, down - rate * scale * up.T @ gradient)
        up, down = moved
        if step > 5 * start:
            weight += ratio * scale * (up @ down - before)
        step_of(adapter, optimizer, step)
        hooks.after_step(step)
    wanted = weight + scale * up @ down
    assert np.abs(product(adapter) - wanted).max() < ROUNDOFF * np.abs(wanted).max()
    assert np.abs(weight - first).max() > 100 * ROUNDOFF * np.abs(wanted).max(), "else nothing is tested"
    kept = STORED + (2 if start else 1) * RANK
    assert [factor.shape for factor in adapter.exported()] == [(OUT, kept), (kept, IN)]


def test_delta_lora_from_the_first_step_is_lora_with_a_larger_alpha():
    """With Adam, whose steps do not depend on the size of gradients if eps is zero."""
    delta = started("delta-lora", own={"delta_ratio": 2.0, "delta_start": 0.0})
    plain = started("lora", alpha=4.5)
    optimizers = [torch.optim.Adam(adapter.parameters(), lr=1e-2, eps=1e-30) for adapter in (delta, plain)]
    for step in range(4):
        for adapter, optimizer in zip((delta, plain), optimizers, strict=True):
            step_of(adapter, optimizer, step)
    assert np.abs(product(delta) - product(plain)).max() < ROUNDOFF * np.abs(product(plain)).max()
    assert np.abs(product(plain) - product(started("lora"))).max() > 0.01


@pytest.mark.parametrize("method", ["lora", "lora-fa"])
def test_new_factors_have_the_same_product_and_the_optimizer_forgets_the_old_ones(method):
    adapter = started(method, own={"refactor_every": 3})
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1)
    hooks = METHODS[method].hooks({"a": adapter}, Course(4, 0.1, lambda parameters: forget(optimizer, parameters)))
    for step in (1, 2):
        step_of(adapter, optimizer, step)
        hooks.after_step(step)
    step_of(adapter, optimizer, 3)
    before = product(adapter)
    hooks.after_step(3)
    assert np.abs(product(adapter) - before).max() < ROUNDOFF * np.abs(before).max()
    up = adapter.up.detach().double().numpy()
    down = (
        adapter.get_buffer("frozen_down")[STORED:].double() if method == "lora-fa" else adapter.down.detach().double()
    )
    down = (adapter.get_buffer("turn").double() @ down if method == "lora-fa" else down).numpy()
    np.testing.assert_allclose(down @ down.T, np.eye(RANK), atol=ROUNDOFF)
    added = before - product(started(method))
    values = np.linalg.svd(added, compute_uv=False)[:RANK] * RANK / 1.5
    np.testing.assert_allclose(up.T @ up, np.diag(values**2), atol=ROUNDOFF * values[0] ** 2)
    assert all(not value.any() for state in optimizer.state.values() for value in state.values())
    assert len(optimizer.state) == len([*adapter.parameters()])
    step_of(adapter, optimizer, 4)
    assert {float(state["step"]) for state in optimizer.state.values()} == {1}


def test_the_tables_of_8_bit_state_stay_when_an_optimizer_forgets():
    parameter, tables = torch.nn.Parameter(torch.zeros(2)), torch.arange(3.0)
    optimizer = torch.optim.SGD([parameter], lr=1)
    optimizer.state[parameter] |= {"step": 7, "state1": torch.ones(2, dtype=torch.uint8), "qmap1": tables.clone()}
    forget(optimizer, [parameter, torch.nn.Parameter(torch.zeros(1))])
    state = optimizer.state[parameter]
    assert (state["step"], state["state1"].tolist(), torch.equal(state["qmap1"], tables)) == (0, [0, 0], True)


@pytest.mark.parametrize("stored", [0, STORED])
def test_boosters_are_kept_exactly_up_to_the_rank_and_then_as_the_best_of_that_rank(stored):
    adapter = started("xgblora", stored=stored)
    frozen, total = product(adapter), np.zeros((OUT, IN))
    for number in range(5):
        up, down = numbers(10 + number, OUT, 1), numbers(20 + number, 1, IN)
        with torch.no_grad():
            adapter.up.copy_(torch.from_numpy(up))
            adapter.down.copy_(torch.from_numpy(down))
        total = total + 1.5 / RANK * up.astype(float) @ down
        assert np.abs(product(adapter) - frozen - total).max() < ROUNDOFF * np.abs(total).max()
        adapter.keep()
        left, values, right = np.linalg.svd(total)
        total = left[:, :RANK] * values[:RANK] @ right[:RANK]
        assert np.abs(product(adapter) - frozen - total).max() < ROUNDOFF * np.abs(total).max()
        kept = stored + min(number + 1, RANK)
        assert [factor.shape for factor in adapter.exported()] == [(OUT, kept), (kept, IN)]
        assert not adapter.up.any()


def test_each_round_trains_new_boosters_in_blocks_that_are_drawn():
    own = {"booster_steps": 2, "booster_layers": 2}
    paths = [f"model.layers.{block}.{kind}" for block in range(5) for kind in ("q_proj", "up_proj")]

    def adapters():
        return {path: started("xgblora", name=path, own=own, seed=3) for path in paths}

    made, forgotten = adapters(), []
    hooks = METHODS["xgblora"].hooks(made, Course(9, 0.1, forgotten.extend))
    drawn, firsts = [], []
    for step in range(1, 9):
        active = {path for path, adapter in made.items() if adapter.is_active}
        assert len(active) == 4
        assert active == {path for path in paths if path.rpartition(".")[0] in {p.rpartition(".")[0] for p in active}}
        assert {path for path, a in made.items() if a.factors()[0].requires_grad} == active
        drawn.append(active)
        firsts.append(made[paths[0]].down.detach().clone())
        with torch.no_grad():
            for path in active:
                made[path].up.add_(step)
        again = {path: adapter.get_buffer("round").clone() for path, adapter in made.items()}
        hooks.after_step(step)
    assert all(drawn[number] == drawn[number + 1] for number in (0, 2, 4, 6))
    assert len({frozenset(one) for one in drawn}) > 1
    assert all((torch.equal(*firsts[n : n + 2])) == (n % 2 == 0) for n in range(7)), "a new one every second step"
    assert len(forgotten) == 4 * 2 * len(paths)
    ranks = {path: adapter.exported()[1].shape[0] - STORED for path, adapter in made.items()}
    assert ranks == {path: min(RANK, sum(path in drawn[number] for number in (0, 2, 4, 6))) for path in paths}
    resumed = adapters()
    for path, adapter in resumed.items():
        adapter.get_buffer("round").copy_(again[path])
    METHODS["xgblora"].hooks(resumed, Course(9, 0.1))
    assert {path for path, adapter in resumed.items() if adapter.is_active} == drawn[-1]
