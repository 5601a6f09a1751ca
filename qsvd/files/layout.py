"""A Split as named tensors, and back: bitsandbytes' names for the residual, PEFT's for the factors (docs/format.md)."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from qsvd.decompose.split import Split
from qsvd.errors import BadInput, listing
from qsvd.numerics import codebook
from qsvd.numerics.codec import Codec, NestedScales, PackedBlocks, from_bytes
from qsvd.numerics.names import spelling
from qsvd.numerics.nf4 import NormalFloat4, bitsandbytes
from qsvd.numerics.normal_float import NormalFloat
from qsvd.plan.allocation import Allocation

# Where the parts of a stored residual are, whichever layout the files have.


Part = TypeVar("Part")


@dataclass(frozen=True)
class StoredResidual(Generic[Part]):
    """The tensors of a residual, or where they lie, by the names of PackedBlocks.tensors; and what they make up."""

    parts: dict[str, Part | bytes]
    shape: tuple[int, int]
    codec: Codec
    nested_block: int | None

    def read(self, read: Callable[[Part], Tensor]) -> PackedBlocks:
        """The residual; `read` gives the tensor of a part."""
        parts = {
            name: torch.frombuffer(bytearray(part), dtype=torch.uint8)
            if isinstance(part, bytes)
            else read(part).reshape(-1).view(torch.uint8)
            for name, part in self.parts.items()
        }
        return from_bytes(parts, self.shape, self.codec, self.nested_block)


ADAPTER_PREFIX = "base_model.model."
QUANT_STATE = "quant_state.bitsandbytes__nf4"
RESIDUAL_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", QUANT_STATE)  # after the weight's name


def residual_tensors(name: str, packed: PackedBlocks, dtype: torch.dtype) -> dict[str, Tensor]:
    """The residual under the names that transformers' bitsandbytes loader expects.

    Args:
        name: The weight's own tensor name, "model.layers.0.self_attn.q_proj.weight".
        dtype: What the loader decodes to, the compute dtype.
    """
    assert isinstance(packed.codec, NormalFloat4), "others have the layout of packed_layout.py"
    nested = packed.scales if isinstance(packed.scales, NestedScales) else None
    inner = nested and bitsandbytes().QuantState(
        absmax=nested.absmax, code=nested.levels, blocksize=nested.block_size, dtype=torch.float32
    )
    state = bitsandbytes().QuantState(
        absmax=nested.codes if nested else packed.scales,
        shape=torch.Size(packed.shape),
        code=codebook.levels(4),
        blocksize=packed.codec.block_size,
        quant_type="nf4",
        dtype=dtype,
        offset=nested.offset if nested else None,
        state2=inner,
    )
    tensors = {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    return {name: packed.codes.view(-1, 1)} | {key: value.cpu().contiguous() for key, value in tensors.items()}


def stored_residual(name: str, tensors: Mapping[str, Part], state: bytes) -> StoredResidual[Part]:
    """What of the result of `residual_tensors` is what.

    Args:
        tensors: By the names in the files; values of any kind.
        state: The JSON of the quantization state.

    Raises:
        BadInput: a tensor is missing, or the quantization is not NF4.
    """
    _check_is_nf4(name, tensors)
    known = json.loads(state)
    rows, columns = known["shape"]
    nested = f"{name}.nested_absmax" in tensors
    codec = NormalFloat4(double_quant=nested, block_size=known["blocksize"])
    parts: dict[str, Part | bytes] = {"codes": tensors[name], "absmax": tensors[f"{name}.absmax"]}
    if not nested:
        return StoredResidual(parts, (rows, columns), codec, None)
    parts = {
        "codes": tensors[name],
        "absmax_codes": tensors[f"{name}.absmax"],
        "absmax": tensors[f"{name}.nested_absmax"],
        "offset": torch.tensor(known["nested_offset"], dtype=torch.float32).numpy().tobytes(),
        "levels": tensors[f"{name}.nested_quant_map"],
    }
    return StoredResidual(parts, (rows, columns), codec, known["nested_blocksize"])


def _check_is_nf4(name: str, tensors: Mapping[str, object]) -> None:
    if any(key not in tensors for key in (name, f"{name}.absmax", f"{name}.{QUANT_STATE}")):
        raise BadInput(f"{name} is no NF4 weight: it needs {name}, .absmax and .{QUANT_STATE}")


def adapter_tensors(module: str, split: Split) -> dict[str, Tensor]:
    """The factors under PEFT's LoRA names; none at rank 0."""
    if split.rank == 0:
        return {}
    prefix = f"{ADAPTER_PREFIX}{module}"
    return {
        f"{prefix}.lora_A.weight": split.down_RI.cpu().contiguous(),
        f"{prefix}.lora_B.weight": split.up_OR.cpu().contiguous(),
    }


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256, in hex, over names and bytes in the order of the names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode() + b"\0")
        total.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def fingerprint(digests: Mapping[str, str]) -> str:
    """SHA-256, in hex, over the digests of all residuals: what ties an adapter to the base it was made for."""
    lines = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()


def adapter_config(modules: list[str], rank: int, task: str | None, base: str) -> dict[str, Any]:
    """The adapter_config.json of a plain LoRA whose scale lora_alpha / r is 1.

    init_lora_weights is true, not "pissa": PEFT would decompose the residual once more. Written by PEFT itself.
    """
    from peft import LoraConfig

    config = LoraConfig(
        task_type=task,
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        bias="none",
        target_modules=modules,
        init_lora_weights=True,
        inference_mode=True,
        base_model_name_or_path=base,
    ).to_dict()
    config["target_modules"] = sorted(modules)  # PEFT keeps a set, whose order changes from run to run
    return config


def quantization_config(left_linears: list[str], *, double_quant: bool, dtype: torch.dtype) -> dict[str, Any]:
    """The quantization_config of config.json, with every linear layer named that is not quantized."""
    name = str(dtype).removeprefix("torch.")
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": name,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": left_linears,
    }


# A residual of the NormalFloat family as named tensors, and back: our own quantization method (docs/format.md, 9).


METHOD = "qsvd"  # quant_method of config.json
PARTS = ("absmax", "absmax_codes", "offset")  # beside the codes, which have the weight's own name


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
        BadInput: a tensor is missing.
    """
    parts = [part for part in codec.parts(shape) if part not in ("codes", "levels")]
    missing = [key for key in (name, *(part_name(name, part) for part in parts)) if key not in tensors]
    if missing:
        raise BadInput(f"{name} is no {spelling(codec)} weight: {listing(missing)} is missing")
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
