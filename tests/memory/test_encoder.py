"""The bytes of the encoder of images, judged by the tensors that transformers' encoder really makes."""

import pytest
import torch
import transformers

from qsvd.memory.encoder import encoder_bytes
from qsvd.memory.split_model import SplitModelPlan, skeleton
from qsvd.memory.twins import LiveBytes
from qsvd.plan.allocation import Allocation
from qsvd.plan.weights import plan_model
from tests.vision import KINDS, SIDE, template, tokenizer

MOST = 4  # times the real peak: what a block frees, and padding of small shapes


def planned(config, architecture):
    config.architectures = [architecture]
    empty = skeleton(config, torch.float32)
    return SplitModelPlan(empty, plan_model(config), Allocation({}), {}, "pissa")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("images", [1, 3, 8])
def test_no_more_is_made_than_is_counted(kind, images):
    make, architecture, mark = KINDS[kind]
    _, config = make(tokenizer(), template(mark))
    found = encoder_bytes(planned(config, architecture), images * 3 * SIDE**2, "cpu")
    model = getattr(transformers, architecture)(config).eval()
    pixels = torch.randn(images, 3, SIDE, SIDE)
    live = LiveBytes([*model.parameters(), *model.buffers(), pixels])
    with torch.no_grad(), live:
        model.get_image_features(pixel_values=pixels)
    assert live.peak <= found <= MOST * live.peak


def test_a_model_of_text_has_no_encoder():
    config = transformers.LlamaConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1, intermediate_size=64)
    assert encoder_bytes(planned(config, "LlamaForCausalLM"), 3 * SIDE**2, "cpu") == 0
