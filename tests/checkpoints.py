"""Tiny random checkpoints of many families, built and saved by transformers itself."""

import shutil
from pathlib import Path

import torch
import transformers

from qsvd.commands.demo import MODEL

SHARED_MODELS = Path(__file__).parents[2] / "shared" / "models"

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
}
GROUPED = COMMON | {"num_key_value_heads": 2}  # grouped-query attention: k and v are half as high

FAMILIES = {  # class -> (config class, options)
    "LlamaForCausalLM": ("LlamaConfig", GROUPED),
    "MistralForCausalLM": ("MistralConfig", GROUPED),
    "Qwen2ForCausalLM": ("Qwen2Config", GROUPED),
    "Qwen3ForCausalLM": ("Qwen3Config", GROUPED | {"head_dim": 16}),
    "GemmaForCausalLM": ("GemmaConfig", GROUPED | {"head_dim": 16}),
    "PhiForCausalLM": ("PhiConfig", GROUPED),
    "Phi3ForCausalLM": ("Phi3Config", GROUPED | {"pad_token_id": 0}),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", COMMON),
    "BertModel": ("BertConfig", COMMON),
    "BertForMaskedLM": ("BertConfig", COMMON),
    "RobertaForMaskedLM": ("RobertaConfig", COMMON),
    "OPTForCausalLM": (
        "OPTConfig",
        {k: v for k, v in COMMON.items() if k != "intermediate_size"} | {"ffn_dim": 128, "word_embed_proj_dim": 32},
    ),
    "T5ForConditionalGeneration": (
        "T5Config",
        {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4, "vocab_size": 96},
    ),
    "MusicgenForCausalLM": (
        "MusicgenDecoderConfig",
        {"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_codebooks": 2}
        | {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 0},
    ),
    "ViTModel": ("ViTConfig", {k: v for k, v in COMMON.items() if k != "vocab_size"} | {"image_size": 32}),
    "ConvBertModel": ("ConvBertConfig", COMMON | {"num_groups": 2, "embedding_size": 64}),
    "SiglipModel": (
        "SiglipConfig",
        {
            "text_config": COMMON | {"max_position_embeddings": 32},
            "vision_config": {k: v for k, v in COMMON.items() if k != "vocab_size"} | {"image_size": 32},
        },
    ),
    "GPT2LMHeadModel": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 96}),
    "MixtralForCausalLM": ("MixtralConfig", GROUPED | {"num_local_experts": 4}),
    "GptOssForCausalLM": (
        "GptOssConfig",
        GROUPED | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 256},
    ),
    "Qwen3_5MoeForCausalLM": (
        "Qwen3_5MoeTextConfig",
        GROUPED
        | {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        | {"shared_expert_intermediate_size": 32, "layer_types": ["full_attention", "full_attention"]},
    ),
    "Glm4MoeForCausalLM": (  # dense, then experts with shared ones
        "Glm4MoeConfig",
        GROUPED
        | {"head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        | {"n_shared_experts": 1, "first_k_dense_replace": 1},
    ),
    "Qwen2MoeForCausalLM": ("Qwen2MoeConfig", GROUPED | {"num_experts": 4}),
    "FalconForCausalLM": ("FalconConfig", {k: v for k, v in COMMON.items() if k != "intermediate_size"}),
}


def tiny_config(architecture: str, **options) -> transformers.PreTrainedConfig:
    """A config of a two-layer model of this class; options replace those of the family."""
    config_class, defaults = FAMILIES[architecture]
    config = getattr(transformers, config_class)(**(defaults | options))
    config.architectures = [architecture]
    return config


def tiny_model(architecture: str, *, seed: int = 0, **options) -> transformers.PreTrainedModel:
    """A float32 model of this class with random weights."""
    torch.manual_seed(seed)
    return getattr(transformers, architecture)(tiny_config(architecture, **options)).eval()


def write_checkpoint(
    folder: Path, architecture: str = "LlamaForCausalLM", *, dtype=torch.bfloat16, max_shard_size="1GB", **options
) -> transformers.PreTrainedModel:
    """Save a tiny random model into `folder` as transformers does; returns the model that was saved."""
    model = tiny_model(architecture, **options).to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def write_tokenizer(folder: Path) -> None:
    """Copy the tokenizer of the embedded model into `folder`."""
    for path in MODEL.glob("tokenizer*.json"):
        shutil.copyfile(path, folder / path.name)


REFUSED = {"GPT2LMHeadModel", "FalconForCausalLM"}  # bitsandbytes replaces no such layers
WITH_EXPERTS = {  # test_experts loads these
    "Glm4MoeForCausalLM",
    "GptOssForCausalLM",
    "MixtralForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3_5MoeForCausalLM",
}
