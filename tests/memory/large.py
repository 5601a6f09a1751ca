"""Llama-3-70B by its published config, planned without a byte of it."""

from functools import cache

import torch
from transformers import LlamaConfig

from qsvd.adapters.adapter import AdapterOptions
from qsvd.adapters.start import planned
from qsvd.memory.block_bytes import Batch
from qsvd.memory.split_model import skeleton
from qsvd.memory.training import Training
from qsvd.numerics.nf4 import NormalFloat4
from qsvd.plan.allocation import Choice, uniform
from qsvd.plan.weights import plan_model

GB = 10**9
CONFIG = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}


@cache
def parts(layers):
    config = LlamaConfig(**CONFIG | {"num_hidden_layers": layers})
    return plan_model(config), skeleton(config, torch.bfloat16)


@cache
def llama_70b(rank, *, dtype="bfloat16", double_quant=True, layers=CONFIG["num_hidden_layers"]):
    """At a rank, with PiSSA."""
    names, empty = parts(layers)
    same = uniform(names.weights, Choice(NormalFloat4(double_quant=double_quant), rank))
    return planned(empty, names, same, options=AdapterOptions(dtype=dtype))


def training(
    tokens=4096, *, batch=1, accumulate=1, checkpointing=True, optimizer="paged_adamw_8bit", layer_major=False
):
    """A run on a GPU."""
    one = Batch(tokens, batch, is_masked=batch > 1, checkpointing=checkpointing, device="cuda")
    return Training(one, accumulate, optimizer, layer_major)
