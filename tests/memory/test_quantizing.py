"""The planned bytes of splitting a weight against those of a real one, on the CPU."""

import pytest
import torch
from transformers import LlamaConfig

from qsvd.adapters.adapter import AdapterOptions
from qsvd.adapters.start import planned
from qsvd.decompose.alternate import STACK, Recipe, split_weights
from qsvd.decompose.moments import Moments
from qsvd.decompose.objective import PLAIN, Objective
from qsvd.decompose.split import measure_stack
from qsvd.memory.items import Limits
from qsvd.memory.other_tasks import plan_quantizing, plan_splitting
from qsvd.memory.split_model import skeleton
from qsvd.numerics.nf4 import NormalFloat4
from qsvd.plan.allocation import Choice, uniform
from qsvd.plan.weights import plan_model
from tests.memory.large import GB, llama_70b
from tests.memory.tracker import Tracker

NEAR = 0.15  # of the peak: the plan bounds short-lived pieces of the encoder and of the norms
CODEC = NormalFloat4(double_quant=True)


def peak_of_splitting(shape, rank, objective=PLAIN, count=1, **how):
    weights, same = torch.randn(count, *shape, generator=torch.Generator().manual_seed(0)).bfloat16(), (0,) * count
    with Tracker() as tracker:
        recipe, objectives = Recipe(CODEC, rank=rank, **{"iterations": 2, **how}), (objective,) * count
        splits = split_weights(weights, recipe, seeds=same, objectives=objectives)
        measure_stack(weights, splits, names="w" * count, role="q", seeds=same)
    return tracker.peak + weights.nbytes


def beside(plan):
    """The planned bytes, without those of reading and writing at the same time."""
    others = ("weights that are read", "weights that are written", "reserve")
    return plan.total("host") - sum(plan[name].host for name in others)


@pytest.mark.parametrize("rank", [0, 32])
def test_splitting_the_largest_weight_takes_what_is_planned(rank):
    config = LlamaConfig(
        hidden_size=1152, intermediate_size=3072, num_hidden_layers=1, num_attention_heads=8, vocab_size=96
    )
    names = plan_model(config)
    same = uniform(names.weights, Choice(CODEC, rank))
    model = planned(skeleton(config, torch.bfloat16), names, same, options=AdapterOptions())
    plan = plan_quantizing(model, "cpu", Limits())
    assert beside(plan) == pytest.approx(peak_of_splitting((3072, 1152), rank), rel=NEAR)
    assert plan["weights that are read"].host == 2 * 3072 * 1152, "the next one"
    written = CODEC.num_bytes((3072, 1152)) + 2 * rank * (3072 + 1152)
    assert plan["weights that are written"].host == written, "the last one"


def test_a_70b_is_split_on_a_small_gpu_with_little_cpu_memory():
    plan = plan_quantizing(llama_70b(64), "cuda", Limits(8 * GB, 8 * GB, 100 * GB))
    assert plan.fits
    assert plan["residual"].disk == pytest.approx(35.3 * GB, rel=2e-3)
    assert plan["weights that are read"].host == 2 * 2 * 8192 * 28672
    assert not plan_quantizing(llama_70b(64), "cuda", Limits(disk=40 * GB)).fits


def test_a_weighted_split_takes_the_copy_that_is_planned():
    shape = (2304, 1088)
    rows, columns = (torch.rand(size, generator=torch.Generator().manual_seed(size)) + 0.5 for size in shape)
    plan = plan_splitting(shape, Choice(CODEC, 32), "cpu", Limits(), weighted=True)
    assert beside(plan) == pytest.approx(peak_of_splitting(shape, 32, Objective(rows, columns)), rel=NEAR)


def test_error_feedback_takes_what_is_planned():
    shape = (1024, 384)
    plan = plan_splitting(shape, Choice(CODEC, 32), "cpu", Limits(), feeds_back=True)
    assert beside(plan) == pytest.approx(peak_of_splitting(shape, 32, rounding="feedback", iterations=1), rel=NEAR)


@pytest.mark.parametrize(
    ("sides", "rounding", "shape"),
    [("inputs", "nearest", (768, 256)), ("both", "feedback", (192, 576))],
)
def test_moments_take_what_is_planned(sides, rounding, shape):
    inputs_II, outputs_OO = (torch.eye(size) + 0.1 for size in reversed(shape))
    moments, given = Moments(inputs_II), inputs_II.nbytes
    if sides == "both":
        moments, given = Moments(inputs_II, outputs_OO), given + outputs_OO.nbytes
    feeds_back = rounding == "feedback"
    plan = plan_splitting(shape, Choice(CODEC, 32), "cpu", Limits(), feeds_back=feeds_back, moments=sides)
    peak = given + peak_of_splitting(shape, 32, moments, rounding=rounding, iterations=1)
    assert beside(plan) == pytest.approx(peak, rel=NEAR)


def test_a_stack_takes_what_is_planned(monkeypatch):
    monkeypatch.setitem(STACK, "cpu", 1 << 20)
    config = LlamaConfig(hidden_size=448, intermediate_size=224, num_hidden_layers=5, num_attention_heads=8)
    names = plan_model(config)
    model = planned(
        skeleton(config, torch.bfloat16),
        names,
        uniform(names.weights, Choice(CODEC, 32)),
        options=AdapterOptions(),
    )
    plan = plan_quantizing(model, "cpu", Limits())
    assert beside(plan) == pytest.approx(peak_of_splitting((448, 448), 32, count=5), rel=NEAR)
    assert plan["weights that are read"].host == 5 * 2 * 448 * 448
    assert "448 x 448, and is split with 4 others." in plan.notes[0]
