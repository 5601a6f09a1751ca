"""What a block quantizer is: a matrix becomes small integers and one scale per block, and comes back.

Shape suffixes: O = out features, I = in features.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad as padded

# Codes of 2, 3, 4 or 8 bits side by side in bytes, the first one in the highest bits: bytes read as one number.


GROUP_CODES = {2: 4, 3: 8, 4: 2, 8: 1}  # the fewest that fill whole bytes
WIDTHS = tuple(GROUP_CODES)


def packed_bytes(num_codes: int, bits: int) -> int:
    """Bytes that so many codes take."""
    return -(-num_codes * bits // 8)


def pack(codes_N: Tensor, bits: int, *, filler: int = 0) -> Tensor:
    """Codes in bytes, uint8 [ceil(N * bits / 8)].

    Args:
        codes_N: uint8, below 2^bits.
        filler: The code whose bits fill the last byte.
    """
    if bits == 8:
        return codes_N
    count = GROUP_CODES[bits]
    codes_GC = padded(codes_N, (0, -len(codes_N) % count), value=filler).view(-1, count)
    bytes_GB = codes_GC.new_zeros(len(codes_GC), count * bits // 8)
    for code, byte, shift in _overlaps(bits):
        bytes_GB[:, byte] |= codes_GC[:, code] << shift if shift >= 0 else codes_GC[:, code] >> -shift
    return bytes_GB.view(-1)[: packed_bytes(len(codes_N), bits)]


def unpack(packed: Tensor, bits: int, num_codes: int) -> Tensor:
    """The first so many codes of packed bytes, uint8 [num_codes]."""
    if bits == 8:
        return packed[:num_codes]
    count = GROUP_CODES[bits]
    size = count * bits // 8
    bytes_GB = padded(packed, (0, -len(packed) % size)).view(-1, size)
    codes_GC = packed.new_zeros(len(bytes_GB), count)
    for code, byte, shift in _overlaps(bits):
        codes_GC[:, code] |= bytes_GB[:, byte] >> shift if shift >= 0 else bytes_GB[:, byte] << -shift
    return codes_GC.bitwise_and_(2**bits - 1).view(-1)[:num_codes]


def _overlaps(bits: int) -> list[tuple[int, int, int]]:
    """Which code of a group lies in which of its bytes, shifted left by how much, or right where that is negative."""
    count = GROUP_CODES[bits]
    shifts = [
        (code, byte, 8 * (byte + 1) - bits * (code + 1)) for code in range(count) for byte in range(count * bits // 8)
    ]
    return [(code, byte, shift) for code, byte, shift in shifts if -bits < shift < 8]


BYTE_LEVELS = 256  # of nested scales that have a byte each
BAND = {"cpu": 1 << 21, "cuda": 1 << 25}  # elements that a layer decodes at a time: 8 MB of float32, 64 of bfloat16


@dataclass(frozen=True)
class NestedScales:
    """Block scales quantized once more (double quantization: QLoRA, arXiv:2305.14314, section 3).

    scale[b] = levels[codes[b]] * absmax[b // block_size] + offset

    Args:
        codes: uint8 [ceil(blocks * bits / 8)], 2^bits being the number of levels; packed where that is less than 256.
        absmax: float32 [ceil(blocks / block_size)].
        offset: float32 scalar, taken off the scales before they were quantized: their mean, or the smallest.
        levels: float32 [4, 8, 16 or 256], in -1..1.
        block_size: Scales that share one absmax.
        num_scales: Blocks; None where every one has a byte of its own.
    """

    codes: Tensor
    absmax: Tensor
    offset: Tensor
    levels: Tensor
    block_size: int
    num_scales: int | None = None

    def decode(self) -> Tensor:
        """The scales, float32 [blocks]."""
        codes = self.codes
        if self.num_scales is not None:
            codes = unpack(codes, self.levels.numel().bit_length() - 1, self.num_scales)
        absmax = self.absmax.repeat_interleave(self.block_size)[: codes.numel()]
        return self.levels[codes.long()] * absmax + self.offset

    def to(self, device: torch.device) -> "NestedScales":
        """The same on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("codes", "absmax", "offset", "levels")}
        return replace(self, **moved)

    @property
    def num_bytes(self) -> int:
        return self.codes.nbytes + self.absmax.nbytes + self.offset.nbytes


@dataclass(frozen=True)
class PackedBlocks:
    """A quantized matrix [O, I].

    Args:
        codes: uint8 [ceil(O * I * bits / 8)], row-major, each code in the highest bits that are free (packing.py).
        scales: float32, or what the codec's scale_dtype is, [blocks]; or nested.
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
            codes = self.codes[packed_bytes(first, self.codec.bits) : packed_bytes(last, self.codec.bits)]
            yield slice(start, stop), PackedBlocks(codes, blocks, (stop - start, columns), self.codec)

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
    """A block quantizer. Blocks run along the flattened row-major matrix, so they may cross rows.

    A block's codes fill whole bytes: bits * block_size divides by 8.
    """

    name: str
    block_size: int  # elements that share a scale
    bits: int = 4  # of a code
    scale_dtype: torch.dtype = torch.float32  # of scales that are not nested

    @abstractmethod
    def encode(self, matrix_OI: Tensor) -> PackedBlocks:
        """Round a float32, bfloat16 or float16 [O, I] matrix; ValueError for another dtype, a NaN or an infinity."""

    @abstractmethod
    def decode(self, packed: PackedBlocks, dtype: torch.dtype) -> Tensor:
        """The matrix [O, I] in a float dtype, rounded once from float32."""

    @abstractmethod
    def decode_into(self, packed: PackedBlocks, out_OI: Tensor) -> None:
        """Write the matrix into `out_OI`, contiguous, of any float dtype, rounded once from float32."""

    def num_bytes(self, shape: tuple[int, int]) -> int:
        """What `encode` of such a matrix will need, by the same count as PackedBlocks.num_bytes."""
        return sum(size for name, size in self.parts(shape).items() if name != "levels")

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
    if nested_block is None:
        return PackedBlocks(parts["codes"], parts["absmax"].view(codec.scale_dtype), shape, codec)
    absmax, levels = parts["absmax"].view(torch.float32), parts["levels"].view(torch.float32)
    offset = parts["offset"].view(torch.float32).view(())
    num_scales = None if levels.numel() == BYTE_LEVELS else math.ceil(math.prod(shape) / codec.block_size)
    scales = NestedScales(parts["absmax_codes"], absmax, offset, levels, nested_block, num_scales)
    return PackedBlocks(parts["codes"], scales, shape, codec)
