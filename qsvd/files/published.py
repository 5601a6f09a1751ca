"""Models that are published in 8 or 4 bits, read as 16-bit models: a tensor is decoded while it is read.

    FP8     (DeepSeek)  X         F8_E4M3 [..., O, I]      X_scale_inv  a scale for each block, which may be cut
    MXFP4   (gpt-oss)   X_blocks  U8 [E, O, I / 32, 16]    X_scales     U8 [E, O, I / 32]

X is BF16, in MXFP4 [E, I, O]. Only what a part needs is read and decoded.
Shape suffixes: E = experts, O = out features, I = in features.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, TypeGuard

import torch
from torch import Tensor

from qsvd.errors import BadInput, listing
from qsvd.files.safetensors import Entry, TensorEntry, read_tensor
from qsvd.numerics.block_floats import MX_GROUP, decode_fp8, decode_mxfp4

SCALES = ("F32", "BF16", "F16", "F8_E8M0")  # dtypes of the scales of FP8
FP8, MXFP4 = "fp8", "mxfp4"  # quant_method in config.json


@dataclass(frozen=True)
class CodedEntry(Entry):
    """A tensor in 8 or 4 bits. Its name, dtype, shape and bytes are those of the decoded one."""

    codes: TensorEntry
    scales: TensorEntry
    block: tuple[int, int] | None  # rows and columns that share a scale; None for MXFP4

    @property
    def stored_bytes(self) -> int:
        return self.codes.num_bytes + self.scales.num_bytes

    def read(self, index: int | None = None, rows: tuple[int, int] | None = None) -> Tensor:
        """Decode a part: one matrix of a stack, and rows of it, as TensorEntry.part takes them."""
        if len(self.shape) == 3 and index is None:
            first, end = rows or (0, self.shape[0])
            self.codes.part(rows=(first, end))  # refuses what is not there
            stack = torch.empty(end - first, *self.shape[1:], dtype=torch.bfloat16)
            for number in range(first, end):
                stack[number - first] = self.read(number)
            return stack
        codes, scales = self.codes.part(index), self.scales.part(index)
        if self.block is None:
            matrix_IO = decode_mxfp4(read_tensor(codes), read_tensor(scales))
            return matrix_IO if rows is None else matrix_IO[slice(*rows)].clone()
        height, (first, end) = self.block[0], rows or (0, codes.shape[0])
        codes, scales = codes.part(rows=(first, end)), scales.part(rows=(first // height, -(-end // height)))
        return decode_fp8(read_tensor(codes), read_tensor(scales), self.block, first % height)


def is_published(quantization: Any) -> TypeGuard[Mapping[str, Any]]:
    """Return whether qsvd decodes a model with this quantization_config, as it is in config.json."""
    if not isinstance(quantization, Mapping):
        return False
    return quantization.get("quant_method") == MXFP4 or _block(quantization) is not None


def decoded(tensors: Mapping[str, Entry], quantization: Mapping[str, Any]) -> dict[str, Entry]:
    """Return the tensors of a checkpoint by the model's names, in their order; codes and their scales are one.

    Args:
        quantization: For which `is_published`.

    Raises:
        BadInput: scales do not fit their codes.
    """
    block = _block(quantization)
    coded = {name: entry for name, entry in tensors.items() if isinstance(entry, TensorEntry)}
    found: dict[str, Entry] = {}
    used = set()
    wrong = []
    for name, entry in tensors.items():
        stem, suffix = (name.removesuffix("_blocks"), "_scales") if block is None else (name, "_scale_inv")
        scales = coded.get(stem + suffix)
        if name not in coded or scales is None or scales.name == name:
            found[name] = entry
            continue
        used.add(scales.name)
        shape = _decoded_shape(coded[name], scales, block)
        if shape is None:
            wrong.append(f"{name} {entry.dtype} {list(entry.shape)} and {scales.dtype} {list(scales.shape)}")
        else:
            found[stem] = CodedEntry(stem, "BF16", shape, 2 * prod(shape), coded[name], scales, block)
    if wrong:
        what = "MXFP4" if block is None else f"F8_E4M3 with a scale for each {block[0]} x {block[1]}"
        raise BadInput(f"{len(wrong)} tensors and their scales are not {what}: {listing(wrong, separator='; ')}")
    return {name: entry for name, entry in found.items() if name not in used}


def _block(quantization: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the rows and columns that share a scale in FP8; None if it is not FP8 with block scales."""
    match quantization:
        case {"quant_method": "fp8", "weight_block_size": [int(rows), int(columns)]} if min(rows, columns) > 0:
            return rows, columns
    return None


def _decoded_shape(codes: TensorEntry, scales: TensorEntry, block: tuple[int, int] | None) -> tuple[int, ...] | None:
    """Return the shape of the decoded tensor; None if the two are not of one."""
    if block is None:
        experts, out_features, groups, group_bytes = codes.shape if len(codes.shape) == 4 else (0, 0, 0, 0)
        is_right = {codes.dtype, scales.dtype} == {"U8"} and scales.shape == (experts, out_features, groups)
        is_right = is_right and 2 * group_bytes == MX_GROUP
        return (experts, groups * MX_GROUP, out_features) if is_right else None
    if codes.dtype != "F8_E4M3" or scales.dtype not in SCALES or len(codes.shape) not in (2, 3):
        return None
    *stack, rows, columns = codes.shape
    blocks = (*stack, -(-rows // block[0]), -(-columns // block[1]))
    return codes.shape if scales.shape == blocks else None
