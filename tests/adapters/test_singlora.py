"""SingLoRA's ramp: u = min(t / T, 1) after t optimizer steps, in a run, after a stop and in the next run."""

import pytest
import torch

from qsvd.adapters.adapter import AdapterOptions
from qsvd.adapters.linear import SplitLinear
from qsvd.adapters.methods.hooks import Course
from qsvd.adapters.methods.singlora import SingLora
from tests import reference
from tests.adapters.principals import principal_of

SHAPE = (33, 64)


def adapters_of(**own):
    options = AdapterOptions("singlora", rank=3, own=own)
    return {
        str(seed): SingLora.start(principal_of(SHAPE, 2), options, torch.Generator().manual_seed(seed))
        for seed in range(2)
    }


def ramps(adapters):
    return {adapter.ramp.item() for adapter in adapters.values()}


@pytest.mark.parametrize(("own", "whole"), [({}, 7), ({"ramp_steps": 3}, 3), ({"ramp_steps": 100}, 100)])
@pytest.mark.parametrize("stop", [None, 2])
def test_the_ramp_is_the_share_of_its_steps_that_are_done(own, whole, stop):
    """A tenth of the run by default; hooks that are restored go on from there."""
    adapters, course = adapters_of(**own), Course(steps=70, learning_rate=1e-3)
    hooks = SingLora.hooks(adapters, course)
    assert ramps(adapters) == {0}
    for step in range(1, 10):
        hooks.after_step(step)
        assert ramps(adapters) == {torch.tensor(min(step / whole, 1.0)).item()}
        if step == stop:
            state = {name: tensor.clone() for name, tensor in hooks.state().items()}
            hooks = SingLora.hooks(adapters, course)
            hooks.restore(state)


def test_a_run_of_few_steps_has_the_whole_product_after_the_first():
    adapters = adapters_of()
    SingLora.hooks(adapters, Course(steps=4, learning_rate=1e-3)).after_step(1)
    assert ramps(adapters) == {1}


def test_a_run_that_goes_on_from_another_starts_at_its_ramp():
    adapters, course = adapters_of(ramp_steps=8), Course(steps=70, learning_rate=1e-3)
    first = SingLora.hooks(adapters, course)
    for step in range(1, 4):
        first.after_step(step)
    SingLora.hooks(adapters, course).after_step(1)
    assert ramps(adapters) == {4 / 8}


def test_forward_passes_do_not_move_the_ramp():
    adapter = adapters_of()["0"]
    module = SplitLinear(principal_of(SHAPE, 2).residual, adapter, None).train()
    for _ in range(3):
        module(torch.from_numpy(reference.gaussian(5, SHAPE[1]))).sum().backward()
    assert adapter.ramp == 0


def test_a_square_product_has_no_negative_eigenvalue():
    options = AdapterOptions("singlora", rank=3)
    adapter = SingLora.start(principal_of((40, 40), 0), options, torch.Generator().manual_seed(0))
    adapter.ramp.fill_(1)
    up, down = adapter.factors()
    values = torch.linalg.eigvalsh((up @ down).detach().double())
    assert values.min() > -1e-7
    assert (values > 0.1).sum() == 3
