"""A split weight as named tensors, and back (docs/format.md).

A residual in NF4 has the names of bitsandbytes; one in another codec has those of qsvd's quantization method (section
9). The components have PEFT's names.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from qsvd.decompose.split import Split
from qsvd.errors import BadInput, listing
from qsvd.files.workspace import ADAPTER_CONFIG as ADAPTER_CONFIG
from qsvd.files.workspace import ADAPTER_PREFIX
from qsvd.files.workspace import ADAPTER_TENSORS as ADAPTER_TENSORS
from qsvd.numerics import codebook
from qsvd.numerics.codec import Codec, NestedScales, PackedBlocks, from_bytes
from qsvd.numerics.names import spelling
from qsvd.numerics.nf4 import NormalFloat4, bitsandbytes
from qsvd.numerics.normal_float import NormalFloat
from qsvd.plan.allocation import Allocation

QUANT_STATE = "quant_state.bitsandbytes__nf4"
RESIDUAL_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", QUANT_STATE)  # after the weight's name
UNREAD = ("quant_map", QUANT_STATE)  # of these: known, and read by itself
METHOD = "qsvd"  # quant_method of config.json
PARTS = ("absmax", "absmax_codes", "offset")  # the tensors of a residual next to its codes
Part = TypeVar("Part")


@dataclass(frozen=True)
class StoredResidual(Generic[Part]):
    """The tensors of a residual, or their entries, by the names of PackedBlocks.tensors."""

    parts: dict[str, Part | bytes]
    shape: tuple[int, int]
    codec: Codec
    nested_block: int | None

    def read(self, read: Callable[[Part], Tensor]) -> PackedBlocks:
        """Read the residual; `read` returns the tensor of a part."""
        parts = {
            name: torch.frombuffer(bytearray(part), dtype=torch.uint8)
            if isinstance(part, bytes)
            else read(part).reshape(-1).view(torch.uint8)
            for name, part in self.parts.items()
        }
        return from_bytes(parts, self.shape, self.codec, self.nested_block)


def residual_tensors(name: str, packed: PackedBlocks, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return an NF4 residual as the tensors that transformers' bitsandbytes loader expects.

    Args:
        name: Name of the weight, "model.layers.0.self_attn.q_proj.weight".
        dtype: Dtype that the loader decodes to.
    """
    assert isinstance(packed.codec, NormalFloat4), "other codecs are stored by packed_tensors"
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
    """Find the parts of a residual that `residual_tensors` named.

    Args:
        tensors: Values of any kind, by the names in the files.
        state: The JSON of the quantization state.

    Raises:
        BadInput: a tensor is missing.
    """
    if any(key not in tensors for key in (name, f"{name}.absmax", f"{name}.{QUANT_STATE}")):
        raise BadInput(f"{name} is not an NF4 weight: it needs {name}, .absmax and .{QUANT_STATE}")
    nested = f"{name}.nested_absmax" in tensors
    try:
        known = json.loads(state)
        (rows, columns), block_size = known["shape"], known["blocksize"]
        nested_block, offset = (known["nested_blocksize"], float(known["nested_offset"])) if nested else (None, 0.0)
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"the {QUANT_STATE} of {name} is damaged: {error!r}") from error
    codec = NormalFloat4(double_quant=nested, block_size=block_size)
    parts: dict[str, Part | bytes] = {"codes": tensors[name], "absmax": tensors[f"{name}.absmax"]}
    if not nested:
        return StoredResidual(parts, (rows, columns), codec, None)
    parts = {
        "codes": tensors[name],
        "absmax_codes": tensors[f"{name}.absmax"],
        "absmax": tensors[f"{name}.nested_absmax"],
        "offset": torch.tensor(offset, dtype=torch.float32).numpy().tobytes(),
        "levels": tensors[f"{name}.nested_quant_map"],
    }
    return StoredResidual(parts, (rows, columns), codec, nested_block)


def adapter_tensors(module: str, split: Split) -> dict[str, Tensor]:
    """Return the components by PEFT's LoRA names; none at rank 0."""
    if split.rank == 0:
        return {}
    prefix = f"{ADAPTER_PREFIX}{module}"
    return {
        f"{prefix}.lora_A.weight": split.down_RI.cpu().contiguous(),
        f"{prefix}.lora_B.weight": split.up_OR.cpu().contiguous(),
    }


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 digest of names and bytes, in the order of the names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode() + b"\0")
        total.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def fingerprint(digests: Mapping[str, str]) -> str:
    """Return the SHA-256 digest of the digests of all residuals: an adapter belongs to one fingerprint."""
    lines = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()


def adapter_config(modules: list[str], rank: int, task: str | None, base: str | None) -> dict[str, Any]:
    """Return the adapter_config.json, made by PEFT, of a plain LoRA whose scale lora_alpha / r is 1.

    init_lora_weights is true, not "pissa": with "pissa" PEFT would decompose the residual again.
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


def quantization_config(
    left_linears: list[str], *, double_quant: bool, dtype: torch.dtype, has_components: bool
) -> dict[str, Any]:
    """Return the quantization_config of config.json for NF4; it names every linear layer that is not quantized.

    With components, bnb_4bit_quant_storage is "int8". transformers reads the packed bytes alike; vLLM and SGLang refuse
    it, so that they do not serve the residual without its components.
    """
    name = str(dtype).removeprefix("torch.")
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": name,
        "bnb_4bit_quant_storage": "int8" if has_components else "uint8",
        "llm_int8_skip_modules": left_linears,
    }


def part_name(name: str, part: str) -> str:
    """Return the name of a part of a residual, "M.absmax" for the weight "M.weight"."""
    return f"{name.removesuffix('weight')}{part}"


def packed_tensors(name: str, packed: PackedBlocks) -> dict[str, Tensor]:
    """Return a residual as the tensors of qsvd's quantization method; the codec determines the level tables.

    The codes have the name of the weight, "model.layers.0.self_attn.q_proj.weight".
    """
    parts = packed.tensors()
    named = {part_name(name, part): parts[part] for part in PARTS if part in parts}
    return {name: parts["codes"]} | {key: tensor.cpu().contiguous() for key, tensor in named.items()}


def stored_packed(
    name: str, tensors: Mapping[str, Part], shape: tuple[int, int], codec: NormalFloat
) -> StoredResidual[Part]:
    """Find the parts of a residual that `packed_tensors` named.

    Args:
        tensors: Values of any kind, by the names in the files.

    Raises:
        BadInput: a tensor is missing.
    """
    parts = [part for part in codec.parts(shape) if part not in ("codes", "levels")]
    missing = [key for key in (name, *(part_name(name, part) for part in parts)) if key not in tensors]
    if missing:
        raise BadInput(f"{name} is not a {spelling(codec)} weight: {listing(missing)} is missing")
    found: dict[str, Part | bytes] = {"codes": tensors[name]}
    found |= {part: tensors[part_name(name, part)] for part in parts}
    if codec.nesting is None:
        return StoredResidual(found, shape, codec, None)
    levels = codec.nesting.levels().numpy().tobytes()
    return StoredResidual({**found, "levels": levels}, shape, codec, codec.nesting.block_size)


def packed_config(
    allocation: Allocation, dtype: torch.dtype, stacks: Mapping[str, str], misplaced: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the quantization_config of config.json for mixed bits: modules by codec, and the dtype of the weights.

    Args:
        stacks: The stack of experts of a module, "" if it is none. With stacks qsvd alone can load the model.
        misplaced: Modules whose components PEFT would put on experts. With them too qsvd alone can.
    """
    codecs: dict[str, list[str]] = {}
    for module, choice in allocation.choices.items():
        if not stacks[module]:
            codecs.setdefault(spelling(choice.codec), []).append(module)
    named = {"quant_method": METHOD, "codecs": dict(sorted(codecs.items())), "dtype": str(dtype).removeprefix("torch.")}
    experts = [stack for stack in dict.fromkeys(stacks.values()) if stack]
    return named | ({"experts": experts} if experts else {}) | ({"misplaced": list(misplaced)} if misplaced else {})
