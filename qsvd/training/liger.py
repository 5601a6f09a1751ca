"""Liger's Triton kernels in training on a GPU, where liger-kernel is installed (qsvd[fast]): RMSNorm, SwiGLU, GeGLU.

A block keeps less for the backward pass with them, so that plans are upper bounds. Liger's rotary embedding is left
out: it replaces a function that all models of the family in this process share, also on a CPU and while memory is
planned. Its losses are left out, since they would replace the forward pass that TRL's chunked loss needs.
"""

import sys
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch

LEFT_OUT = {"rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False}
FAMILIES = (  # whose outputs and gradients were the same in Triton's interpreter (0.8.5, docs/log.md)
    *("exaone4", "gemma", "gemma2", "gemma3", "gemma3_text", "glm4", "granite", "hunyuan_v1_dense", "llama"),
    *("ministral", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "qwen3_5", "qwen3_5_text", "smollm3"),
)


def has_liger(model_type: str, device: torch.device) -> bool:
    """Tell whether Liger's kernels are used: they are installed, known for the family, and the device is a GPU."""
    return device.type == "cuda" and model_type in FAMILIES and find_spec("liger_kernel") is not None


def said_of_liger(model_type: str, device: torch.device) -> list[str]:
    """Return the line that says so."""
    if not has_liger(model_type, device):
        return []
    name = f"liger-kernel {version('liger-kernel')}"
    return [f"Kernels: norms and gated units are those of {name}, since it is installed; without it, transformers'"]


def use_liger(model: Any) -> None:
    """Give the norms and gated units of a loaded model Liger's forward passes, if `has_liger`."""
    if not has_liger(model.config.model_type, model.device):
        return
    from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]
        _apply_liger_kernel_to_instance as apply,
    )

    names = {type(module).__module__ for module in model.modules()}
    files = [sys.modules[name] for name in names if name.startswith("transformers.models.")]
    before = [dict(vars(file)) for file in files]
    apply(model=model, **LEFT_OUT)
    for file, kept in zip(files, before, strict=True):
        vars(file).update(kept)  # it replaces the classes too, of which models are made later
