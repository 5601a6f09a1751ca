"""PRILoRA's parts of `lora`: what a pruning sets to zero, the norms of inputs that it sees, and ranks by depth."""

import numpy as np
import pytest
import torch

import qsvd
from qsvd.adapters.adapter import AdapterOptions
from qsvd.adapters.methods.hooks import Course
from qsvd.adapters.methods.lora import MEMORY, Lora, Prune
from qsvd.adapters.methods.table import METHODS, options_for
from qsvd.adapters.model import split_linears
from qsvd.training.together import unseen
from tests import reference
from tests.adapters.principals import principal_of
from tests.runs import sequences, settings, trainer

ROWS, COLUMNS, RANK = 12, 30, 4


def hooks_of(**own):
    options = AdapterOptions("lora", rank=RANK, own=own)
    adapter = Lora.start(principal_of((ROWS, COLUMNS), 0), options, torch.Generator().manual_seed(0))
    return Prune({"a": adapter}, Course(9, 1e-3)), adapter


def test_the_lowest_share_of_each_row_is_set_to_zero_by_value_times_norm_and_may_grow_again():
    hooks, adapter = hooks_of(prune_every=2, prune_share=0.4)
    running = np.zeros(COLUMNS)
    for step in (1, 2, 3, 4):
        before = adapter.down.detach().double().numpy().copy()
        squares = np.zeros(COLUMNS)
        for part in (0, 1):  # of a step
            x = reference.gaussian(7, COLUMNS, seed=10 * step + part) * np.linspace(0.2, 3, COLUMNS)[::-1]
            adapter.look(torch.from_numpy(x.astype(np.float32)))
            squares += (x**2).sum(axis=0)
        running = MEMORY * running + (1 - MEMORY) * np.sqrt(squares)
        hooks.after_step(step)
        expected = before.copy()
        if step % 2 == 0:
            for row, least in zip(expected, np.argsort(np.abs(before) * running, axis=1), strict=True):
                row[least[: int(0.4 * COLUMNS)]] = 0
        np.testing.assert_array_equal(adapter.down.detach().double().numpy(), expected)
        with torch.no_grad():
            adapter.down += 0.01 * torch.from_numpy(reference.gaussian(RANK, COLUMNS, seed=step))
    again = Prune({"a": adapter}, Course(9, 1e-3))
    again.restore(hooks.state())
    np.testing.assert_allclose(again.norms["a"].double().numpy(), running, rtol=1e-5)


def test_nothing_is_pruned_without_the_option_or_before_an_input():
    for hooks, adapter in (hooks_of(), hooks_of(prune_every=1)):
        before = adapter.down.clone()
        hooks.after_step(1)
        assert torch.equal(adapter.down, before)
    assert hooks_of()[0].state() == {}
    assert not hooks_of()[1].looks


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 1, "accumulate": 4},
        {"batch_size": 1, "accumulate": 4, "gradient_checkpointing": True},
        {"batch_size": 1, "accumulate": 4, "gradient_checkpointing": True, "layer_major": True},
    ],
    ids=["kept", "checkpointing", "layer-major"],
)
def test_every_token_of_a_step_is_seen_once(language, tmp_path, changes):
    """B is 0 in the first step: the inputs are those of the quantized model, sequence by sequence."""
    rows = sequences((12, 12, 12, 12))
    options = AdapterOptions("lora", rank=4, own={"prune_every": 5})
    made = trainer(language, tmp_path, rows, settings(**changes), options=options)
    made.train()
    model, seen = qsvd.load(language, dtype=torch.float32).eval(), {}
    for path, linear in split_linears(model):

        def note(_, inputs, path=path):
            squares = inputs[0].detach().double().square().flatten(0, -2).sum(dim=0)
            seen[path] = seen.get(path, 0) + squares

        linear.register_forward_pre_hook(note)
    with torch.no_grad():
        for ids in rows["input_ids"]:
            model(input_ids=torch.tensor([ids]))
    assert made.hooks.prune.norms.keys() == seen.keys()
    for path, squares in seen.items():
        found = made.hooks.prune.norms[path].double() / (1 - MEMORY)
        torch.testing.assert_close(found, squares.sqrt(), rtol=1e-4, atol=1e-5)


def test_inputs_are_not_seen_where_nothing_is_trained(language):
    """Of a batch that a process has in the place of none, so that all of a sharded run take the same steps."""
    options = AdapterOptions("lora", rank=4, own={"prune_every": 5})
    model = qsvd.load(language, dtype=torch.float32, options=options).train()
    hooks = Prune({path: linear.adapter for path, linear in split_linears(model)}, Course(9, 1e-3))
    ids = torch.arange(3, 9)[None]
    with unseen(model):
        model(input_ids=ids)
    assert not any(squares.any() for squares in hooks.looked())
    model(input_ids=ids)
    assert all(squares.any() for squares in hooks.looked())


@pytest.mark.parametrize(
    ("options", "ranks", "scale"),
    [
        ({"rank": 4, "own": {"rank_end": 12}}, [4, 7, 9, 12], 1 / 4),
        ({"rank": 4, "alpha": 8.0, "own": {"rank_end": 12}}, [4, 7, 9, 12], 2.0),
        ({"rank": 9, "own": {"rank_end": 1}}, [9, 6, 4, 1], 1 / 4),
        ({"own": {"rank_end": 1}}, [64, 43, 22, 1], 1 / 4),
    ],
)
def test_ranks_are_linear_in_depth_at_one_scale(options, ranks, scale):
    names = [f"model.layers.{number}.mlp.up_proj" for number in range(4)]
    kind, found = METHODS["lora"], []
    for name in names:
        own = options_for(AdapterOptions("lora", **options), kind, name, names)
        assert kind.defaults.rank_and_scale(own, 0) == (pytest.approx(ranks[len(found)]), pytest.approx(scale))
        found.append(own)
    assert options_for(AdapterOptions("pissa"), METHODS["pissa"], names[1], names) == AdapterOptions("pissa")
    assert options_for(AdapterOptions("lora", rank=4), kind, names[1], names) == AdapterOptions("lora", rank=4)
