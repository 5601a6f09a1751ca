"""The interface of a block quantizer: a matrix becomes codes of 2, 3, 4 or 8 bits and one scale per block, and back.

Codes are packed bit after bit, the first code in the highest bits of the first byte, but in Int4. The codecs are
NormalFloat4 (nf4.py), NormalFloat (normal_float.py) and Int4 (int4.py); names.py finds them by name.

Shape suffixes: O = out features, I = in features, B = blocks, N = codes, G = groups, C = codes of one group.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

GROUP_CODES = {2: 4, 3: 8, 4: 2, 8: 1}  # bits of a code -> the fewest codes that fill whole bytes
WIDTHS = tuple(GROUP_CODES)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # dtypes of a matrix to encode
BYTE_LEVELS = 256  # levels of nested scales that have a byte each
SMALLEST_SCALE = 1e-38  # the least divisor, as in bitsandbytes
BAND = {"cpu": 1 << 21, "cuda": 1 << 25}  # elements that a layer decodes at a time: 8 MB of float32, 64 of bfloat16


@dataclass(frozen=True)
class NestedScales:
    """Block scales that are quantized again (double quantization: QLoRA, arXiv:2305.14314, section 3).

    scale[b] = levels[codes[b]] * absmax[b // block_size] + offset

    Args:
        codes: uint8 [ceil(blocks * bits / 8)]; the number of levels is 2^bits. Packed if there are fewer than 256.
        absmax: float32 [ceil(blocks / block_size)].
        offset: float32 scalar, subtracted from the scales before they are quantized: their mean or their minimum.
        levels: float32 [4, 8, 16 or 256], in -1..1.
        block_size: Scales that share one absmax.
        num_scales: Number of blocks; None if every scale has a byte.
    """

    codes: Tensor
    absmax: Tensor
    offset: Tensor
    levels: Tensor
    block_size: int
    num_scales: int | None = None

    def decode(self) -> Tensor:
        """Return the scales, float32 [blocks]."""
        codes = self.codes
        if self.num_scales is not None:
            codes = unpack(codes, self.levels.numel().bit_length() - 1, self.num_scales)
        absmax = self.absmax.repeat_interleave(self.block_size)[: codes.numel()]
        return self.levels[codes.long()] * absmax + self.offset

    def of_blocks(self, first: int, last: int) -> "NestedScales":
        """Return the scales of the blocks from `first`, a multiple of block_size, to before `last`, in views."""
        bits = self.levels.numel().bit_length() - 1
        codes = self.codes[packed_bytes(first, bits) : packed_bytes(last, bits)]
        absmax = self.absmax[first // self.block_size : math.ceil(last / self.block_size)]
        count = None if self.num_scales is None else last - first
        return replace(self, codes=codes, absmax=absmax, num_scales=count)

    def to(self, device: torch.device) -> "NestedScales":
        """Return a copy on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("codes", "absmax", "offset", "levels")}
        return replace(self, **moved)

    @property
    def num_bytes(self) -> int:
        """Bytes that grow with the matrix; `levels` is shared and not counted."""
        return self.codes.nbytes + self.absmax.nbytes + self.offset.nbytes


def plain_scales(scales: Tensor | NestedScales) -> Tensor:
    """Return one scale per block [B], decoded to float32 if they are nested."""
    return scales.decode() if isinstance(scales, NestedScales) else scales


@dataclass(frozen=True)
class PackedBlocks:
    """A quantized matrix [O, I].

    Args:
        codes: uint8 [ceil(O * I * bits / 8)], row-major, in the codec's order of bits.
        scales: [blocks] in the codec's scale_dtype, or nested.
        shape: (O, I).
        codec: The codec that encoded the matrix and decodes it.
    """

    codes: Tensor
    scales: Tensor | NestedScales
    shape: tuple[int, int]
    codec: "Codec"

    def decode(self, out: Tensor | None = None, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the matrix [O, I], rounded once from float32.

        Args:
            out: Contiguous [O, I], float32, bfloat16 or float16; the matrix is written there and `dtype` is ignored.
            dtype: Dtype of a new matrix.
        """
        if out is None:
            return self.codec.decode(self, dtype)
        self.codec.decode_into(self, out)
        return out

    def in_rows(self, most_elements: int) -> Iterator[tuple[slice, "PackedBlocks"]]:
        """Yield bands of rows with the rows they hold.

        A band begins and ends with a block. It has at most `most_elements` elements, unless its blocks need more. Its
        scales are nested if those of the matrix are, and bands can begin where a new absmax does.
        """
        rows, columns = self.shape
        block_size, bits, scales = self.codec.block_size, self.codec.bits, self.scales
        height, stays_nested = band_rows(self.shape, block_size, self.nested_block, most_elements)
        if isinstance(scales, NestedScales) and not stays_nested:
            scales = scales.decode()
        for start in range(0, rows, height):
            stop = min(start + height, rows)
            first, last = start * columns // block_size, math.ceil(stop * columns / block_size)
            blocks = scales.of_blocks(first, last) if isinstance(scales, NestedScales) else scales[first:last]
            codes = self.codes[packed_bytes(start * columns, bits) : packed_bytes(stop * columns, bits)]
            yield slice(start, stop), PackedBlocks(codes, blocks, (stop - start, columns), self.codec)

    def to(self, device: torch.device) -> "PackedBlocks":
        """Return a copy on another device."""
        return PackedBlocks(self.codes.to(device), self.scales.to(device), self.shape, self.codec)

    @property
    def nested_block(self) -> int | None:
        """Scales that share one absmax; None if scales are not nested."""
        return self.scales.block_size if isinstance(self.scales, NestedScales) else None

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the packed matrix by name; `from_bytes` makes the matrix of them again."""
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
        """Bytes that grow with the matrix: codes and scales, without level tables, which all matrices share."""
        scales = self.scales
        return self.codes.nbytes + (scales.num_bytes if isinstance(scales, NestedScales) else scales.nbytes)


def band_rows(shape: tuple[int, int], block_size: int, nested_block: int | None, most: int) -> tuple[int, bool]:
    """Return the rows of a band of at most `most` elements, and whether its scales stay nested; see `in_rows`."""
    rows, columns = shape
    step = block_size // math.gcd(columns, block_size)
    stays_nested = False
    if nested_block is not None:
        group = block_size * nested_block  # elements that share an absmax
        nested_step = group // math.gcd(columns, group)
        stays_nested = rows * columns <= most or nested_step * columns <= most
        step = nested_step if stays_nested else step
    return max(most // columns // step, 1) * step, stays_nested


class Codec(ABC):
    """A block quantizer. Blocks run along the flattened row-major matrix, so that a block may cross rows.

    The codes of a block fill whole bytes: bits * block_size is a multiple of 8.
    """

    FORMS: str  # the names of this class, as error messages state them
    name: str  # in tables, files and options; `codec_named` of names.py returns an equal codec
    block_size: int  # elements that share a scale
    bits: int = 4  # of a code
    scale_dtype: torch.dtype = torch.float32  # of scales that are not nested
    nested: tuple[int, int] | None = None  # bits of a scale that is quantized again, and scales that share one absmax
    reach: float = 1.0  # the magnitude up to which the levels reach with both signs
    low_first: bool = False  # whether the first code of a byte has the low bits; of codes of 4 bits alone

    @classmethod
    def from_name(cls, name: str) -> "Codec | None":
        """Return the codec of this class with a name; None if names of this class have another form.

        Raises:
            ValueError: the name has the form, but a value in it is not allowed.
        """
        del name
        return None

    @abstractmethod
    def encode(self, matrix_OI: Tensor) -> PackedBlocks:
        """Quantize a finite float32, bfloat16 or float16 [O, I] matrix.

        Raises:
            ValueError: matrix_OI has another dtype or number of dimensions, or holds a NaN or an infinity.
        """

    def decode(self, packed: PackedBlocks, dtype: torch.dtype) -> Tensor:
        """Return the matrix [O, I] in a float dtype, rounded once from float32."""
        out_OI = torch.empty(packed.shape, dtype=dtype, device=packed.codes.device)
        self.decode_into(packed, out_OI)
        return out_OI

    @abstractmethod
    def decode_into(self, packed: PackedBlocks, out_OI: Tensor) -> None:
        """Write the matrix into `out_OI`, contiguous, of any float dtype, rounded once from float32."""

    def parts(self, shape: tuple[int, int]) -> dict[str, int]:
        """Return the bytes of each tensor of an [O, I] packed matrix, by the names of PackedBlocks.tensors."""
        num_blocks = math.ceil(math.prod(shape) / self.block_size)
        codes = {"codes": packed_bytes(math.prod(shape), self.bits)}
        if self.nested is None:
            return codes | {"absmax": self.scale_dtype.itemsize * num_blocks}
        bits, size = self.nested
        nested = {"absmax_codes": packed_bytes(num_blocks, bits), "absmax": 4 * math.ceil(num_blocks / size)}
        return codes | nested | {"offset": 4, "levels": 4 * 2**bits}

    def num_bytes(self, shape: tuple[int, int]) -> int:
        """Return the PackedBlocks.num_bytes of an [O, I] matrix."""
        return sum(size for name, size in self.parts(shape).items() if name != "levels")

    def stored_scales(self, scales_B: Tensor) -> Tensor | NestedScales:
        """Return float32 scales of a matrix as they are stored: in another dtype, or quantized again."""
        return scales_B.to(self.scale_dtype)

    def levels(self, device: torch.device) -> Tensor:
        """Return the numbers that codes stand for, times their scale, float32 [2^bits], ascending."""
        raise NotImplementedError

    def values(self, codes_N: Tensor) -> Tensor:
        """Return what codes stand for, times their scale, float32 [N]."""
        levels_L = self.levels(codes_N.device)
        if codes_N.is_cuda:
            return levels_L.index_select(0, codes_N.int())
        return torch.from_numpy(levels_L.numpy().take(codes_N.numpy(), mode="clip"))  # in half of the time

    def nearest(self, scaled_N: Tensor) -> Tensor:
        """Return the code of the nearest level of each value, uint8 [N].

        Args:
            scaled_N: float32, without a NaN; values beyond the levels take the first or the last code.
        """
        raise NotImplementedError

    @property
    def has_signed_scales(self) -> bool:
        """Whether a scale may be negative, which mirrors the levels: not if it is nested, as scales then lie close."""
        return self.nested is None

    def packed(self, codes_N: Tensor, scales: Tensor | NestedScales, shape: tuple[int, int]) -> PackedBlocks:
        """Return a matrix of these codes, uint8, and stored scales."""
        return PackedBlocks(pack(codes_N, self.bits, filler=2 ** (self.bits - 1) - 1), scales, shape, self)

    def check_encodable(self, matrix_OI: Tensor) -> None:
        """Raise ValueError unless the dtype and the number of dimensions are those that `encode` takes."""
        if matrix_OI.ndim != 2 or matrix_OI.dtype not in FLOATS:
            raise ValueError(
                f"{self.name} encodes a float32, bfloat16 or float16 matrix, not {matrix_OI.dtype} "
                f"{tuple(matrix_OI.shape)}"
            )


def from_bytes(
    parts: Mapping[str, Tensor], shape: tuple[int, int], codec: Codec, nested_block: int | None
) -> PackedBlocks:
    """Return a packed matrix whose tensors are views of bytes.

    Args:
        parts: The tensors of PackedBlocks.tensors, each as flat uint8.
        nested_block: Scales that share one absmax; None if scales are not nested.
    """
    if nested_block is None:
        return PackedBlocks(parts["codes"], parts["absmax"].view(codec.scale_dtype), shape, codec)
    absmax, levels = parts["absmax"].view(torch.float32), parts["levels"].view(torch.float32)
    offset = parts["offset"].view(torch.float32).view(())
    num_scales = None if levels.numel() == BYTE_LEVELS else math.ceil(math.prod(shape) / codec.block_size)
    scales = NestedScales(parts["absmax_codes"], absmax, offset, levels, nested_block, num_scales)
    return PackedBlocks(parts["codes"], scales, shape, codec)


def packed_bytes(num_codes: int, bits: int) -> int:
    """Return the bytes that `num_codes` packed codes take."""
    return -(-num_codes * bits // 8)


def pack(codes_N: Tensor, bits: int, *, filler: int = 0) -> Tensor:
    """Pack codes into bytes, uint8 [ceil(N * bits / 8)].

    Args:
        codes_N: uint8, below 2^bits.
        filler: The code whose bits fill the last byte.
    """
    if bits == 8:
        return codes_N
    count = GROUP_CODES[bits]
    codes_GC = pad(codes_N, (0, -len(codes_N) % count), value=filler).view(-1, count)
    bytes_GB = codes_GC.new_zeros(len(codes_GC), count * bits // 8)
    for code, byte, shift in _overlaps(bits):
        bytes_GB[:, byte] |= codes_GC[:, code] << shift if shift >= 0 else codes_GC[:, code] >> -shift
    return bytes_GB.view(-1)[: packed_bytes(len(codes_N), bits)]


def unpack(packed: Tensor, bits: int, num_codes: int) -> Tensor:
    """Return the first `num_codes` codes of packed bytes, uint8 [num_codes]."""
    if bits == 8:
        return packed[:num_codes]
    count = GROUP_CODES[bits]
    size = count * bits // 8
    bytes_GB = pad(packed, (0, -len(packed) % size)).view(-1, size)
    codes_GC = packed.new_zeros(len(bytes_GB), count)
    for code, byte, shift in _overlaps(bits):
        codes_GC[:, code] |= bytes_GB[:, byte] >> shift if shift >= 0 else bytes_GB[:, byte] << -shift
    return codes_GC.bitwise_and_(2**bits - 1).view(-1)[:num_codes]


def _overlaps(bits: int) -> list[tuple[int, int, int]]:
    """Return (code, byte, shift) of a group: the code lies in the byte, shifted left, or right if shift is negative."""
    count = GROUP_CODES[bits]
    places = ((code, byte) for code in range(count) for byte in range(count * bits // 8))
    shifts = ((code, byte, 8 * (byte + 1) - bits * (code + 1)) for code, byte in places)
    return [(code, byte, shift) for code, byte, shift in shifts if -bits < shift < 8]
