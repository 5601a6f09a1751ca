"""Models at their published sizes: what is split of mixtures of experts, and of models that read images.

The configs have the published values (config.json of each model on the Hub); the numbers of parameters are those of the
model cards, without extra prediction layers. The towers of images stay in 16 bits.
"""

from dataclasses import replace

import pytest
import transformers

from qsvd.plan.allocation import tables_of
from qsvd.plan.weights import coverage, plan_model

SIZES = {  # name -> (class, config class, options, 10^9 parameters)
    "Qwen3-30B-A3B": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {"hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48}
        | {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128}
        | {"num_experts_per_tok": 8, "vocab_size": 151936},
        30.5,
    ),
    "gpt-oss-20b": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {"hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64}
        | {"num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32, "vocab_size": 201088},
        20.9,
    ),
    "gpt-oss-120b": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {"hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 36, "num_attention_heads": 64}
        | {"num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 128, "vocab_size": 201088},
        116.8,
    ),
    "GLM-4.5-Air": (
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        {"hidden_size": 4096, "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 46}
        | {"num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128, "n_routed_experts": 128}
        | {"n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 1, "vocab_size": 151552},
        106.9,
    ),
    "DeepSeek-V3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {"hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61}
        | {"num_attention_heads": 128, "num_key_value_heads": 128, "n_routed_experts": 256, "n_shared_experts": 1}
        | {"num_experts_per_tok": 8, "first_k_dense_replace": 3, "vocab_size": 129280},
        671.0,
    ),
    "Gemma-3-27B": (
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "text_config": {"hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 62}
            | {"num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128, "vocab_size": 262208},
            "vision_config": {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27}
            | {"num_attention_heads": 16, "image_size": 896, "patch_size": 14, "vision_use_head": False},
        },
        27.43,
    ),
    "Qwen3-VL-8B": (
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLConfig",
        {
            "text_config": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36}
            | {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936},
            "vision_config": {"hidden_size": 1152, "intermediate_size": 4304, "depth": 27, "num_heads": 16}
            | {"out_hidden_size": 4096, "patch_size": 16, "deepstack_visual_indexes": [8, 16, 24]},
        },
        8.77,
    ),
}


NEED_TABLES = {"Qwen3-VL-8B": 0.79}  # share without embedding and head, 14 % of so small a model


def planned(name):
    architecture, kind, options, _ = SIZES[name]
    config = getattr(transformers, kind)(**options)
    config.architectures = [architecture]
    return plan_model(config)


@pytest.mark.parametrize("name", SIZES)
def test_more_than_nine_tenths_are_split(name):
    plan = planned(name)
    found = coverage(plan)
    assert found.elements / 1e9 == pytest.approx(SIZES[name][-1], rel=0.01)
    if name in NEED_TABLES:
        assert found.share == pytest.approx(NEED_TABLES[name], abs=0.005)
        found = coverage(replace(plan, weights=(*plan.weights, *tables_of(plan, head_bits=8, embedding_bits=8))))
    assert found.share > 0.9
