"""Moments of inputs and gradients on a GPU against those on a CPU."""

import pytest
import torch

from qsvd.calibrate.block_walk import GradientWalk, InputWalk
from qsvd.calibrate.streamed import StreamedModel
from tests.calibrate.cases import case, examples_of, stack_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

NEAR = 1e-3  # of the largest entry: TF32 is off, other kernels


def silent(words):
    del words


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "MixtralForCausalLM"])
def test_moments_of_inputs_are_those_on_a_cpu(architecture):
    one, examples = case(architecture), examples_of(architecture)
    devices = [torch.device(name) for name in ("cuda", "cpu")]
    walks = [
        InputWalk(StreamedModel(one.checkpoint, one.plan, device, torch.float32, twice=False), examples, silent)
        for device in devices
    ]
    for spec in sorted(one.plan.weights, key=walks[0].place):
        found, expected = (walk.objective(spec) for walk in walks)
        if not expected.is_plain:
            largest = float(expected.inputs_II.abs().max())
            torch.testing.assert_close(found.inputs_II.cpu(), expected.inputs_II, rtol=0, atol=NEAR * largest)


def test_gradients_have_a_moment_of_every_output():
    one, examples = case("LlamaForCausalLM"), examples_of("LlamaForCausalLM")
    model = StreamedModel(one.checkpoint, one.plan, torch.device("cuda"), torch.bfloat16, twice=False)
    walk = GradientWalk(model, examples, silent, seed=0, inputs=stack_of())
    for spec in sorted(one.plan.weights, key=walk.place):
        found = walk.objective(spec)
        assert found.outputs_OO.is_cuda
        assert float(found.outputs_OO.diagonal().sum()) > 0
