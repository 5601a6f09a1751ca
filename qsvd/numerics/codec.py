"""What a block quantizer is: a matrix becomes small integers and one scale per block, and comes back.

Shape suffixes: O = out features, I = in features.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NestedScales:
    """Block scales quantized once more, to 8 bits (double quantization: QLoRA, arXiv:2305.14314, section 3).

    scale[b] = levels[codes[b]] * absmax[b // block_size] + offset

    Args:
        codes: uint8 [blocks].
        absmax: float32 [ceil(blocks / block_size)].
        offset: float32 scalar, the mean of the scales before they were quantized.
        levels: float32 [256], in -1..1.
        block_size: Scales that share one absmax.
    """

    codes: Tensor
    absmax: Tensor
    offset: Tensor
    levels: Tensor
    block_size: int

    def decode(self) -> Tensor:
        """The scales, float32 [blocks]."""
        absmax = self.absmax.repeat_interleave(self.block_size)[: self.codes.numel()]
        return self.levels[self.codes.long()] * absmax + self.offset

    def to(self, device: torch.device) -> "NestedScales":
        """The same on another device."""
        absmax, offset = self.absmax.to(device), self.offset.to(device)
        return NestedScales(self.codes.to(device), absmax, offset, self.levels.to(device), self.block_size)

    @property
    def num_bytes(self) -> int:
        return self.codes.nbytes + self.absmax.nbytes + self.offset.nbytes


@dataclass(frozen=True)
class PackedBlocks:
    """A quantized matrix [O, I].

    Args:
        codes: uint8 [ceil(O * I / codes per byte)], row-major; of two 4-bit codes the first is in the high half.
        scales: float32 [blocks], or the same scales nested.
        shape: (O, I).
        codec: Who encoded it, and decodes it.
    """

    codes: Tensor
    scales: Tensor | NestedScales
    shape: tuple[int, int]
    codec: "Codec"

    def decode(self, out: Tensor | None = None, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix again, [O, I] in `dtype`, rounded once from float32; into `out` (contiguous, [O, I]) if given.

        `out` may be float32, bfloat16 or float16, and its dtype stands above `dtype`.
        """
        if out is None:
            return self.codec.decode(self, dtype)
        self.codec.decode_into(self, out)
        return out

    def in_rows(self, most_elements: int) -> Iterator[tuple[slice, "PackedBlocks"]]:
        """The matrix in bands of rows that begin and end with a block, each of about so many elements at most.

        Yields the rows and what they are, with scales that are not nested.
        """
        rows, columns = self.shape
        step = self.codec.block_size // math.gcd(columns, self.codec.block_size)
        height = max(most_elements // columns // step, 1) * step
        scales = self.scales.decode() if isinstance(self.scales, NestedScales) else self.scales
        for start in range(0, rows, height):
            stop = min(start + height, rows)
            first, last = start * columns, stop * columns
            blocks = scales[first // self.codec.block_size : math.ceil(last / self.codec.block_size)]
            yield (
                slice(start, stop),
                PackedBlocks(self.codes[first // 2 : (last + 1) // 2], blocks, (stop - start, columns), self.codec),
            )

    def to(self, device: torch.device) -> "PackedBlocks":
        """The same on another device."""
        return PackedBlocks(self.codes.to(device), self.scales.to(device), self.shape, self.codec)

    @property
    def nested_block(self) -> int | None:
        """Scales that share one absmax; None where scales are not nested."""
        return self.scales.block_size if isinstance(self.scales, NestedScales) else None

    def tensors(self) -> dict[str, Tensor]:
        """What it consists of, by name."""
        if not isinstance(self.scales, NestedScales):
            return {"codes": self.codes, "absmax": self.scales}
        return {
            "codes": self.codes,
            "absmax_codes": self.scales.codes,
            "absmax": self.scales.absmax,
            "offset": self.scales.offset,
            "levels": self.scales.levels,
        }

    @property
    def num_bytes(self) -> int:
        """Bytes that grow with the matrix: codes and scales; level tables (shared by all matrices) not counted."""
        return self.codes.nbytes + (
            self.scales.num_bytes if isinstance(self.scales, NestedScales) else self.scales.nbytes
        )


class Codec(ABC):
    """A block quantizer. Blocks run along the flattened row-major matrix, so they may cross rows."""

    name: str
    block_size: int  # elements that share a scale

    @abstractmethod
    def encode(self, matrix_OI: Tensor) -> PackedBlocks:
        """Round a float32, bfloat16 or float16 [O, I] matrix; ValueError for another dtype, a NaN or an infinity."""

    @abstractmethod
    def decode(self, packed: PackedBlocks, dtype: torch.dtype) -> Tensor:
        """The matrix [O, I] in a float dtype, rounded once from float32."""

    @abstractmethod
    def decode_into(self, packed: PackedBlocks, out_OI: Tensor) -> None:
        """Write the matrix into `out_OI`, contiguous, of any float dtype, rounded once from float32."""

    @abstractmethod
    def num_bytes(self, shape: tuple[int, int]) -> int:
        """What `encode` of such a matrix will need, by the same count as PackedBlocks.num_bytes."""

    @abstractmethod
    def parts(self, shape: tuple[int, int]) -> dict[str, int]:
        """Bytes of every tensor of such a packed matrix, level tables too, by the names of PackedBlocks.tensors."""


def from_bytes(
    parts: Mapping[str, Tensor], shape: tuple[int, int], codec: Codec, nested_block: int | None
) -> PackedBlocks:
    """A packed matrix in views of bytes.

    Args:
        parts: What PackedBlocks.tensors gives, each as flat uint8.
        nested_block: Scales that share one absmax; None where scales are not nested.
    """
    absmax = parts["absmax"].view(torch.float32)
    if nested_block is None:
        return PackedBlocks(parts["codes"], absmax, shape, codec)
    offset, levels = parts["offset"].view(torch.float32).view(()), parts["levels"].view(torch.float32)
    return PackedBlocks(
        parts["codes"], NestedScales(parts["absmax_codes"], absmax, offset, levels, nested_block), shape, codec
    )
