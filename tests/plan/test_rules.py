"""Which layers stay in 16 bits, against models that transformers builds, and layers written here to break one rule."""

import pytest
import torch
import transformers
from torch import nn

from qsvd.plan import rules
from qsvd.plan.language import example_inputs, towers
from qsvd.plan.weights import build, coverage, plan_model

TOKENS = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = TOKENS | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAVA = {
    "text_config": SMALL | {"model_type": "llama"},
    "vision_config": VISION | {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 16},
    "image_token_index": 90,
}
MAMBA = TOKENS | {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 16, "time_step_rank": 32}


def config_of(name, options, architecture):
    config = getattr(transformers, name)(**options)
    config.architectures = [architecture]
    return config


def reasons(config, **options):
    """Reason -> last names of the layers."""
    found = {}
    for path, reason in plan_model(config, **options).reasons.items():
        found.setdefault(reason, set()).add(path.rpartition(".")[2])
    return found


def test_a_side_below_32_stays():
    config = config_of("LlamaConfig", SMALL | {"num_key_value_heads": 1}, "LlamaForCausalLM")  # k and v are [16, 64]
    assert reasons(config) == {rules.SHORT: {"k_proj", "v_proj"}}
    left = {tensors.pattern: tensors.size for tensors in coverage(plan_model(config)).left}
    assert left["model.layers.*.self_attn.k_proj.weight"] == "2 tensors, 2,048 elements: a side below 32"


def test_what_the_kernels_of_mamba_read_stays():
    config = config_of("MambaConfig", MAMBA, "MambaForCausalLM")
    assert reasons(config) == {rules.READ: {"x_proj", "dt_proj", "out_proj"}}


def test_layers_of_groups_stay():
    config = config_of("ConvBertConfig", SMALL | {"num_groups": 2, "embedding_size": 64}, "ConvBertModel")
    plan = plan_model(config)
    assert reasons(config)[rules.GROUPED] == {"dense"}
    left = {tensors.pattern: tensors.reason for tensors in coverage(plan).left}
    assert left["encoder.layer.*.intermediate.dense.weight"] == rules.GROUPED
    assert {"encoder.layer.0.attention.output.dense"} < {spec.module for spec in plan.weights}


class Reader(nn.Module):
    slow, kind = False, "fast"

    def __init__(self):
        super().__init__()
        for name in ("used", "asked", "closed", "helped", "written"):
            setattr(self, name, nn.Linear(64, 64))

    def forward(self, x):
        if self.slow and x is not None:
            x = x @ self.closed.weight
        if self.kind == "slow":
            x = self.closed.weight + x
        x = x.to(self.asked.weight.dtype)
        return self._help(nn.functional.linear(x, self.used.weight))

    def _help(self, x):
        return x * self.helped.weight.sum()

    def reset(self):
        self.written.weight.data.zero_()


def test_code_that_uses_a_weight_is_found_where_forward_reaches_it():
    assert rules.weights_read(Reader()) == {"used", "helped"}
    slow = Reader()
    slow.slow = True
    assert rules.weights_read(slow) == {"used", "helped", "closed"}


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Same(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + self.bias


@pytest.mark.parametrize(("kind", "is_product"), [(nn.Linear, True), (Same, True), (Scaled, False)])
def test_a_subclass_that_computes_more_stays(kind, is_product):
    assert rules._is_product(kind(64, 64)) == is_product


def test_towers_stay_unless_they_are_asked_for():
    config = config_of("LlavaConfig", LLAVA, "LlavaForConditionalGeneration")
    plan = plan_model(config)
    assert {reason for path, reason in plan.reasons.items() if "vision" in path} == {rules.TOWER}
    assert {spec.module.rpartition(".layers")[0] for spec in plan.weights} == {"model.language_model"}
    both = {spec.module.rpartition(".layers")[0] for spec in plan_model(config, include_towers=True).weights}
    assert both == {"model.language_model", "model.vision_tower.encoder"}


def test_a_model_that_writes_no_text_has_no_towers():
    config = config_of("CLIPConfig", {"text_config": SMALL, "vision_config": VISION}, "CLIPModel")
    assert towers(build(config)) == ()


@pytest.mark.parametrize(
    ("name", "options", "architecture"),
    [
        ("LlavaConfig", LLAVA, "LlavaForConditionalGeneration"),
        ("T5Config", TOKENS | {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 1, "num_heads": 4}, "T5Model"),
        ("ViTConfig", VISION | {"image_size": 32}, "ViTModel"),
        ("CLIPConfig", {"text_config": SMALL, "vision_config": VISION | {"image_size": 32}}, "CLIPModel"),
        ("Wav2Vec2Config", VISION | {"num_conv_pos_embeddings": 16}, "Wav2Vec2Model"),
    ],
)
def test_an_example_is_an_input_that_the_model_takes(name, options, architecture):
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(getattr(transformers, name)(**options)).eval()
    with torch.no_grad():
        assert len(model(**example_inputs(model, 2, 8))[0])
