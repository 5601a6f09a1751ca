"""Residuals of 4-bit whole numbers as compressed-tensors stores them (docs/format.md, section 12).

For the weight "M.weight" the files hold M.weight_packed, int32 [O, I / 8], M.weight_scale, bfloat16 [O, I / group], and
M.weight_shape, int64 [2]. Readers of a quantized model find the codes under the name of the weight (`renamed`).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from qsvd.errors import BadInput, listing
from qsvd.files.layout import StoredResidual
from qsvd.numerics.codec import PackedBlocks
from qsvd.numerics.int4 import Int4
from qsvd.plan.weights import ModelPlan

METHOD, FORMAT = "compressed-tensors", "pack-quantized"
CODES, SCALES, SHAPE = "_packed", "_scale", "_shape"  # after the weight's name
Part = TypeVar("Part")


def compressed_tensors(name: str, packed: PackedBlocks) -> dict[str, Tensor]:
    """Return a residual as the tensors of compressed-tensors; `name` is that of the weight."""
    assert isinstance(packed.codec, Int4), "other codecs have other layouts"
    assert isinstance(packed.scales, Tensor), "its scales are not nested"
    rows, columns = packed.shape
    return {
        name + CODES: packed.codes.cpu().contiguous().view(torch.int32).view(rows, columns // 8),
        name + SCALES: packed.scales.cpu().contiguous().view(rows, columns // packed.codec.block_size),
        name + SHAPE: torch.tensor([rows, columns]),
    }


def renamed(tensors: Mapping[str, Part], names: Iterable[str]) -> dict[str, Part]:
    """Return tensors of the files with the codes of these weights under the names of the weights."""
    owners = {name + CODES: name for name in names}
    return {owners.get(key, key): part for key, part in tensors.items()}


def part_names(name: str) -> tuple[str, ...]:
    """Return the names of the tensors of a residual, after `renamed`."""
    return name, name + SCALES, name + SHAPE


def stored_compressed(
    name: str, tensors: Mapping[str, Part], shape: tuple[int, int], codec: Int4
) -> StoredResidual[Part]:
    """Find the parts of a residual among tensors that `renamed` returned.

    Raises:
        BadInput: a tensor is missing.
    """
    found = {"codes": name, "absmax": name + SCALES}
    if missing := [key for key in found.values() if key not in tensors]:
        files = [key if key != name else name + CODES for key in missing]
        raise BadInput(f"{name} is not an {codec.name} weight: {listing(files)} is missing")
    parts: dict[str, Part | bytes] = {part: tensors[key] for part, key in found.items()}
    return StoredResidual(parts, shape, codec, None)


def ignored_layers(plan: ModelPlan, heads: Sequence[str]) -> tuple[str, ...]:
    """Return the paths of the linear layers that stay in 16 bits, and of heads that another class may add.

    Names are compared whole, so that layers of a bare model are also named as in a class with a head.
    """
    left, prefix = plan.left_linears, f"{plan.base_prefix}."
    is_bare = not any(spec.module.startswith(prefix) for spec in plan.weights)
    return tuple(dict.fromkeys((*left, *(f"{prefix}{path}" for path in left if is_bare), *heads)))


def compressed_config(codec: Int4, left_linears: Sequence[str]) -> dict[str, Any]:
    """Return the quantization_config of config.json.

    With `dequantize` transformers decodes the weights while it loads the model; else compressed-tensors does at the
    first forward pass, and until then the layers have no weight, without which PEFT adds no adapter. vLLM ignores it.

    Args:
        left_linears: Paths of every linear layer that stays in 16 bits.
    """
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": codec.block_size}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(left_linears),
        "kv_cache_scheme": None,
        "dequantize": True,
    }
