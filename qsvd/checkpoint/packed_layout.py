"""A residual of the NormalFloat family as named tensors, and back: our own quantization method (docs/format.md, 9)."""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from qsvd.checkpoint.stored import StoredResidual
from qsvd.numerics.codec import PackedBlocks
from qsvd.numerics.codecs import spelling
from qsvd.numerics.normal_float_bits import NormalFloat
from qsvd.plan.allocation import Allocation
from qsvd.plan.listing import listing

METHOD = "qsvd"  # quant_method of config.json
PARTS = ("absmax", "absmax_codes", "offset")  # beside the codes, which have the weight's own name
Part = TypeVar("Part")


def part_name(name: str, part: str) -> str:
    """ "M.absmax" for the weight "M.weight"."""
    return f"{name.removesuffix('weight')}{part}"


def packed_tensors(name: str, packed: PackedBlocks) -> dict[str, Tensor]:
    """The residual under the names of qsvd's own quantization method; level tables, which all share, are left out.

    Args:
        name: The weight's own tensor name, "model.layers.0.self_attn.q_proj.weight".
    """
    parts = packed.tensors()
    named = {part_name(name, part): parts[part] for part in PARTS if part in parts}
    return {name: parts["codes"]} | {key: tensor.cpu().contiguous() for key, tensor in named.items()}


def stored_packed(
    name: str, tensors: Mapping[str, Part], shape: tuple[int, int], codec: NormalFloat
) -> StoredResidual[Part]:
    """What of the result of `packed_tensors` is what.

    Args:
        tensors: By the names in the files; values of any kind.

    Raises:
        ValueError: a tensor is missing.
    """
    parts = [part for part in codec.parts(shape) if part not in ("codes", "levels")]
    missing = [key for key in (name, *(part_name(name, part) for part in parts)) if key not in tensors]
    if missing:
        raise ValueError(f"{name} is no {spelling(codec)} weight: {listing(missing)} is missing")
    found: dict[str, Part | bytes] = {"codes": tensors[name]}
    found |= {part: tensors[part_name(name, part)] for part in parts}
    if codec.nesting is None:
        return StoredResidual(found, shape, codec, None)
    levels = codec.nesting.levels().numpy().tobytes()
    return StoredResidual({**found, "levels": levels}, shape, codec, codec.nesting.block_size)


def packed_config(allocation: Allocation, dtype: torch.dtype) -> dict[str, Any]:
    """The quantization_config of config.json: the modules of every codec, and the dtype the weights had."""
    codecs: dict[str, list[str]] = {}
    for module, choice in allocation.choices.items():
        codecs.setdefault(spelling(choice.codec), []).append(module)
    return {"quant_method": METHOD, "codecs": dict(sorted(codecs.items())), "dtype": str(dtype).removeprefix("torch.")}
