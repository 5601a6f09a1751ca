"""MLP channels are found by shapes: a model without them computes what it does with zeros in their columns of down."""

import copy

import numpy as np
import pytest
import torch
import transformers

from qsvd.errors import BadInput
from qsvd.plan.language import example_inputs
from qsvd.plan.weights import build
from qsvd.prune.channels import Cut, chosen, find_mlps, important, kept_channels
from tests.checkpoints import FAMILIES, WITH_EXPERTS, tiny_config, tiny_model

CHANNELS, KEPT = 128, 48
REFUSED = {"GPT2LMHeadModel", "FalconForCausalLM", "ConvBertModel", "SiglipModel"}
PRUNED = sorted(FAMILIES.keys() - REFUSED - WITH_EXPERTS)


def outputs(model):
    torch.manual_seed(0)
    with torch.no_grad():
        return next(value for value in model(**example_inputs(model, 2, 8)).to_tuple() if torch.is_tensor(value))


@pytest.mark.parametrize("architecture", PRUNED)
def test_a_family_without_channels_computes_what_it_does_with_zeros_in_their_place(architecture):
    config, model = tiny_config(architecture), tiny_model(architecture)
    found = find_mlps(build(config), config)
    assert (found.channels, len(found.blocks) % 2) == (CHANNELS, 0)
    narrow = copy.deepcopy(config)
    setattr(narrow, found.option, KEPT)
    pruned = getattr(transformers, architecture)(narrow).eval()
    tensors, draw = dict(model.state_dict()), torch.Generator().manual_seed(0)
    for tensor in tensors.values():
        if tensor.is_floating_point():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=draw))  # biases are zeros in a new model
    before = outputs(model)
    for cuts in found.blocks.values():
        kept = torch.randperm(CHANNELS, generator=draw)[:KEPT].sort().values
        removed = [channel for channel in range(CHANNELS) if channel not in kept]
        for cut in cuts:
            tensors[cut.name] = chosen(tensors[cut.name], cut, kept, CHANNELS)
            if cut.is_weight and cut.axis == 1:
                model.get_parameter(cut.name).data[:, removed] = 0
    pruned.load_state_dict(tensors)
    wanted = outputs(model)
    assert (wanted - before).abs().max() > 1e-2 * wanted.std(), "the removed channels say something"
    assert (outputs(pruned) - wanted).abs().max() <= 1e-4 * wanted.std()


@pytest.mark.parametrize("architecture", sorted(REFUSED | WITH_EXPERTS))
def test_other_families_are_refused_in_a_sentence(architecture):
    config = tiny_config(architecture)
    why = {"SiglipModel": "images or sound"} | dict.fromkeys(WITH_EXPERTS, "it has experts")
    with pytest.raises(BadInput, match=why.get(architecture, "none of its numbers is such a width")):
        find_mlps(build(config), config)


def test_gate_and_up_in_one_tensor_are_refused_where_they_alternate(monkeypatch):
    """As in a Phi-3 whose rows are gate, up, gate, up: rows c and F + c are no channel there."""
    kind = transformers.models.phi3.modeling_phi3.Phi3MLP

    def alternating(self, hidden_states):
        gate, up = self.gate_up_proj(hidden_states).unflatten(-1, (-1, 2)).unbind(-1)
        return self.down_proj(self.activation_fn(gate) * up)

    monkeypatch.setattr(kind, "forward", alternating)
    config = tiny_config("Phi3ForCausalLM")
    with pytest.raises(BadInput, match="Phi3ForCausalLM is none of these"):
        find_mlps(build(config), config)


def test_two_widths_are_refused():
    sizes = {"d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "vocab_size": 96, "pad_token_id": 0}
    heads = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = transformers.BartConfig(**sizes, **heads, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
    config.architectures = ["BartForConditionalGeneration"]
    with pytest.raises(BadInput, match=r"(en|de)coder_ffn_dim, (en|de)coder_ffn_dim are widths of different MLPs"):
        find_mlps(build(config), config)


def test_importance_is_the_product_of_the_norms_of_gate_up_and_down():
    draw = np.random.default_rng(0)
    gate, up, down = draw.normal(size=(40, 9)), draw.normal(size=(40, 9)), draw.normal(size=(9, 40))
    product = np.linalg.norm(gate, axis=1) * np.linalg.norm(up, axis=1) * np.linalg.norm(down, axis=0)
    wanted = sorted(np.argsort(-product)[:12].tolist())
    rows, columns = Cut("up.weight", 0, 1), Cut("down.weight", 1, 1)
    apart = [(rows, gate), (rows, up), (columns, down)]
    fused = [(Cut("gate_up.weight", 0, 2), np.concatenate((gate, up))), (columns, down)]
    for weights in (apart, fused):
        assert important(((cut, torch.tensor(weight).float()) for cut, weight in weights), 40, 12) == wanted
    same = torch.ones(40, 9, dtype=torch.bfloat16)
    assert important(iter([(rows, same)]), 40, 3) == [0, 1, 2], "of equal ones the first"


@pytest.mark.parametrize(
    ("channels", "keep", "kept", "multiple"),
    [(11008, 0.5, 5504, 64), (11008, 0.3, 3328, 64), (768, 0.5, 384, 64), (128, 0.5, 64, 16), (7, 0.5, 4, 1)],
)
def test_kept_channels_are_a_multiple_of_a_power_of_two(channels, keep, kept, multiple):
    assert kept_channels(channels, keep) == (kept, multiple)
    assert kept_channels(channels, 1e-9) == (1, 1)


def test_a_share_that_keeps_all_is_refused_and_the_one_that_is_named_is_not():
    with pytest.raises(BadInput, match=r"--keep 0.99 of 768 channels, rounded to a multiple of 64, .* give 0.917 or"):
        kept_channels(768, 0.99)
    assert kept_channels(768, 0.917) == (704, 64)
