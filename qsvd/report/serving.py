"""Commands that serve what qsvd writes with vLLM.

vLLM reads compressed-tensors models by itself, and from version 0.28 on bitsandbytes models with the package
vllm-bnb-plugin. Read in vLLM 0.32.0 and plugin 0.0.3; not run by the tests.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from qsvd.report.card import shell

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of --max-lora-rank
JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}  # layers of vLLM
COMPRESSED = "compressed-tensors"  # quant_method of config.json
PLUGIN = "pip install vllm-bnb-plugin  # vLLM reads bitsandbytes models with it, on one GPU"


def vllm_rank(rank: int) -> int:
    """Return the smallest --max-lora-rank of vLLM that a LoRA of this rank fits in."""
    return next((allowed for allowed in RANKS if allowed >= rank), rank)


def lora_flags(name: str, folder: str, rank: int) -> str:
    """Return the flags that serve the LoRA in `folder` as the model `name`."""
    module = json.dumps({"name": name, "path": folder}, ensure_ascii=False)
    return f"--enable-lora --max-lora-rank {vllm_rank(rank)} --lora-modules {shell(module)}"


def four_bit_line(base: str, name: str, folder: str, rank: int, quantization: Mapping[str, Any]) -> str:
    """Return the command that serves the residual in `base` with the LoRA in `folder`.

    `quantization` is the quantization_config of the base. Of bitsandbytes' the line replaces bnb_4bit_quant_storage,
    which makes vLLM refuse the residual alone (files/layout.py); requests must name the model `name`.
    """
    line = f"vllm serve {shell(base)} --served-model-name residual-only --dtype bfloat16 "
    line += lora_flags(name, folder, rank)
    if quantization.get("quant_method") == COMPRESSED:
        return line
    served = json.dumps({"quantization_config": {**quantization, "bnb_4bit_quant_storage": "uint8"}})
    return f"{line} --hf-overrides {shell(served)}"


def compressed_serving(folder: str, rank: int) -> list[str]:
    """Return how vLLM serves an export of 4-bit weights; `rank` is that of its adapter, 0 if it has none."""
    after = "llama.cpp does not read compressed-tensors models: use --to merged for it"
    if not rank:
        return [f"vLLM: vllm serve {shell(folder)}", after]
    line = four_bit_line(folder, "trained", folder, rank, {"quant_method": COMPRESSED})
    return [line, "in requests, name the model trained; the model residual-only gives wrong outputs", after]


def joined_layers(left: Sequence[str], quantized: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the joined layers of vLLM that stay in 16 bits, and those of which a part is quantized and a part is not.

    vLLM computes q, k and v as one layer, and gate and up as one. Its plugin compares the names of the joined layers
    with llm_int8_skip_modules, and quantizes while loading what these names do not cover. Of a compressed-tensors model
    it refuses a joined layer of which a part alone is quantized.

    Args:
        left: Paths of the linear layers that stay in 16 bits.
        quantized: Paths of the others.
    """
    pattern = re.compile(rf"(.*\.)({'|'.join(part for parts in JOINED.values() for part in parts)})$")
    joined_of = {part: joined for joined, parts in JOINED.items() for part in parts}

    def joined(paths: Sequence[str]) -> dict[str, None]:
        found = (pattern.match(path) for path in paths)
        return dict.fromkeys(f"{match[1]}{joined_of[match[2]]}" for match in found if match)

    in_16_bits, in_4_bits = joined(left), joined(quantized)
    return (
        [path for path in in_16_bits if path not in in_4_bits],
        [path for path in in_16_bits if path in in_4_bits],
    )
