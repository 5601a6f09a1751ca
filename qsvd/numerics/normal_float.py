"""NormalFloat of 2, 3, 4 or 8 bits in small blocks, with scales of 32 or 16 bits or quantized again.

These are the candidates of LQ-LoRA's mixed precision (arXiv:2311.12023, section 3.2). bitsandbytes cannot read them; it
reads NormalFloat4 (nf4.py). On a GPU with Triton, kernels.py does the work, otherwise torch operations; the results are
the same.

Shape suffixes: O = out features, I = in features, B = blocks, E = elements of one block, N = all elements, S = blocks
of scales.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from math import ceil, gcd
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import pad

from qsvd.numerics import codebook, codec
from qsvd.numerics.codec import FLOATS, SMALLEST_SCALE, WIDTHS, Codec, NestedScales, PackedBlocks, packed_bytes

BLOCK_SIZES = (16, 32, 64, 128)
NESTED_BLOCKS = (16, 64, 256)
SCALES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # as names spell them
NAME = re.compile(r"nf(\d+)-(\d+)-(?:(fp32|fp16|bf16)|(\d+)x(\d+))(-fit)?")
RUN = {"cpu": 1 << 18, "cuda": 1 << 24}  # elements worked on at a time: on a CPU they stay in the cache
HAS_TRITON = find_spec("triton") is not None


@dataclass(frozen=True)
class Nesting:
    """Scales that are quantized again, as LQ-LoRA does: in blocks, to 2^bits even steps from the smallest scale.

    The smallest scale of the matrix is the offset, so that no scale becomes negative; the rest of the others is divided
    by the largest of each block, which is kept in float32. On real weights this usually loses less than NormalFloat
    around the mean with 2 and 3 bits, and as much with 4 and 8. A scale near the smallest may become zero.

    Args:
        bits: Bits of a scale: 2, 3, 4 or 8.
        block_size: Scales that share one float32: 16, 64 or 256.

    Raises:
        ValueError: bits or block_size has another value.
    """

    bits: int = 8
    block_size: int = 256

    def __post_init__(self):
        _check("scales have", self.bits, WIDTHS, "bits")
        _check("blocks of scales have", self.block_size, NESTED_BLOCKS, "scales")

    def levels(self) -> Tensor:
        """Return the steps from 0 to 1, float32 [2^bits]."""
        steps = 2**self.bits - 1
        return torch.arange(steps + 1, dtype=torch.float32) / steps

    def encode(self, scales_B: Tensor) -> NestedScales:
        """Quantize the float32 scales of one matrix."""
        offset = scales_B.min() if len(scales_B) else scales_B.new_zeros(())
        rest_SB = pad(scales_B - offset, (0, -len(scales_B) % self.block_size)).view(-1, self.block_size)
        absmax_S = rest_SB.amax(dim=1)
        divisor_S = torch.where(absmax_S > 0, absmax_S, 1)
        levels = self.levels().to(scales_B.device)
        codes_B = (rest_SB / divisor_S[:, None] * (len(levels) - 1)).round_().to(torch.uint8).view(-1)[: len(scales_B)]
        num_scales = None if len(levels) == codec.BYTE_LEVELS else len(scales_B)
        return NestedScales(codec.pack(codes_B, self.bits), absmax_S, offset, levels, self.block_size, num_scales)


class NormalFloat(Codec):
    """NormalFloat of `bits` in blocks of `block_size`.

    Args:
        bits: Bits of a code: 2, 3, 4 or 8.
        block_size: Elements that share a scale: 16, 32, 64 or 128.
        scales: float32, float16, bfloat16, or a Nesting. Codes are chosen for the scales as they are stored.
        fit: Choose the scales for the least error (codebook.fitted). Otherwise each is the largest magnitude of its
            block, as in the papers. Both decode alike.

    Raises:
        ValueError: an argument has another value.
    """

    FORMS = (
        f"nf<bits>-<block>-<scales> with {', '.join(map(str, WIDTHS))} bits, blocks of "
        f"{', '.join(map(str, BLOCK_SIZES))}, and scales fp32, fp16, bf16 or <bits>x<block> with blocks of "
        f"{', '.join(map(str, NESTED_BLOCKS))}, and -fit after it for fitted scales, such as nf3-64-8x256-fit"
    )

    def __init__(
        self, *, bits: int, block_size: int = 64, scales: torch.dtype | Nesting = torch.float32, fit: bool = False
    ):
        _check("codes have", bits, WIDTHS, "bits")
        _check("blocks have", block_size, BLOCK_SIZES, "elements")
        if not isinstance(scales, Nesting) and scales not in FLOATS:
            raise ValueError(f"scales are float32, float16, bfloat16 or a Nesting, not {scales}")
        self.bits = bits
        self.fit = fit
        self.block_size = block_size
        self.nesting = scales if isinstance(scales, Nesting) else None
        self.nested = (scales.bits, scales.block_size) if isinstance(scales, Nesting) else None
        self.scale_dtype = torch.float32 if isinstance(scales, Nesting) else scales
        stored = next(name for name, dtype in SCALES.items() if dtype == self.scale_dtype)
        if isinstance(scales, Nesting):
            stored = f"{scales.bits}x{scales.block_size}"
        self.name = f"nf{bits}-{block_size}-{stored}{'-fit' if fit else ''}"

    @classmethod
    def from_name(cls, name: str) -> "NormalFloat | None":
        found = NAME.fullmatch(name)
        if found is None:
            return None
        bits, block_size, dtype, scale_bits, scale_block, fit = found.groups()
        scales = SCALES[dtype] if dtype else Nesting(int(scale_bits), int(scale_block))
        return cls(bits=int(bits), block_size=int(block_size), scales=scales, fit=bool(fit))

    def encode(self, matrix_OI: Tensor) -> PackedBlocks:
        """Quantize a finite float32, bfloat16 or float16 [O, I] matrix.

        Raises:
            ValueError: matrix_OI has another dtype or number of dimensions, holds a NaN or an infinity, or numbers too
                large for scales of 16 bits.
        """
        self.check_encodable(matrix_OI)
        flat_N = matrix_OI.reshape(-1)
        largest_B = self._largest(flat_N)
        if not torch.isfinite(largest_B).all():
            raise ValueError(f"{self.name} cannot encode a matrix that holds a NaN or an infinity")
        scales_B = largest_B
        if self.fit:
            scales_B = torch.empty_like(largest_B)
            for run, blocks, _ in self._runs(flat_N):
                largest = largest_B[blocks]
                scales_B[blocks] = codebook.fitted(flat_N[run].float().view(len(largest), -1), largest, self)
        scales = self.stored_scales(scales_B)
        codes = self._codes(flat_N, codec.plain_scales(scales).float())
        return PackedBlocks(codes, scales, (matrix_OI.shape[0], matrix_OI.shape[1]), self)

    def decode_into(self, packed: PackedBlocks, out_OI: Tensor) -> None:
        if kernels := kernels_for(out_OI):
            kernels.decode_into(packed, out_OI.view(-1))
            return
        out_N, scales_B = out_OI.view(-1), codec.plain_scales(packed.scales).float()
        for run, blocks, part in self._runs(out_N):
            out_BE = out_N[run].view(scales_B[blocks].numel(), -1)
            levels_N = codebook.look_up(packed.codes[part], self.bits, out_BE.numel())
            torch.mul(levels_N.view(out_BE.shape), scales_B[blocks, None], out=out_BE)

    def levels(self, device: torch.device) -> Tensor:
        return codebook.levels(self.bits, device)

    def nearest(self, scaled_N: Tensor) -> Tensor:
        return codebook.nearest(scaled_N, self.bits)

    def _runs(self, flat_N: Tensor) -> Iterator[tuple[slice, slice, slice]]:
        """Yield elements, their blocks and the bytes of their codes, in runs of whole blocks; a short block is last."""
        num_elements = flat_N.numel()
        num_full = num_elements - num_elements % self.block_size
        step = RUN[flat_N.device.type]
        ends = [*range(0, num_full, step), num_full, num_elements]
        for start, stop in pairwise(ends):
            if start < stop:
                blocks = slice(start // self.block_size, ceil(stop / self.block_size))
                yield slice(start, stop), blocks, slice(packed_bytes(start, self.bits), packed_bytes(stop, self.bits))

    def _largest(self, flat_N: Tensor) -> Tensor:
        """Return the largest magnitude of each block, float32 [B]; NaN if the block holds one."""
        if kernels := kernels_for(flat_N):
            return kernels.largest(flat_N, self.block_size)
        largest_B = torch.empty(ceil(flat_N.numel() / self.block_size), device=flat_N.device)
        for run, blocks, _ in self._runs(flat_N):
            largest = largest_B[blocks]
            torch.amax(flat_N[run].float().view(len(largest), -1).abs(), dim=1, out=largest)
        return largest_B

    def stored_scales(self, scales_B: Tensor) -> Tensor | NestedScales:
        if self.nesting is not None:
            return self.nesting.encode(scales_B)
        stored_B = scales_B.to(self.scale_dtype)
        if not torch.isfinite(stored_B).all():
            most = torch.finfo(self.scale_dtype).max
            raise ValueError(
                f"a scale of {float(scales_B.max()):.4g} is above {most:.4g}, the largest {self.scale_dtype}; "
                "float32 scales hold it"
            )
        return stored_B

    def _codes(self, flat_N: Tensor, scales_B: Tensor) -> Tensor:
        """Return the packed codes of the levels that are nearest for these scales."""
        inverse_B = scales_B.sign() / scales_B.clamp(min=SMALLEST_SCALE)  # a scale of zero takes the code of zero
        if kernels := kernels_for(flat_N):
            return kernels.nearest_codes(flat_N, inverse_B, self.bits, self.block_size)
        codes = torch.empty(packed_bytes(flat_N.numel(), self.bits), dtype=torch.uint8, device=flat_N.device)
        for run, blocks, part in self._runs(flat_N):
            inverse = inverse_B[blocks]
            scaled_BE = flat_N[run].float().view(len(inverse), -1) * inverse[:, None]
            zero = 2 ** (self.bits - 1) - 1
            codes[part] = codec.pack(codebook.nearest(scaled_BE.view(-1), self.bits), self.bits, filler=zero)
        return codes


def rows_of(packed: PackedBlocks, rows_N: Tensor) -> Tensor:
    """Return rows of a matrix in 8 bits, float32 [N, I], with the values of `decode`.

    Args:
        packed: Of a NormalFloat of 8 bits, whose scales are not nested or nested in 8 bits.
        rows_N: int64 or int32, on the device of the matrix.

    Raises:
        IndexError: a row is outside the matrix (on a GPU the kernel stops).
    """
    (rows, columns), size = packed.shape, packed.codec.block_size
    assert packed.codec.bits == 8, "codes of 8 bits are bytes"
    codes_NI = packed.codes.view(rows, columns).index_select(0, rows_N)
    run = gcd(columns, size)  # numbers of a row that have one scale
    first_N1 = rows_N.long()[:, None] * (columns // run)
    blocks_NP = (first_N1 + torch.arange(columns // run, device=rows_N.device)) // (size // run)
    scales_NP = _scales_at(packed.scales, blocks_NP)
    values_NI = codebook.levels(8, codes_NI.device)[codes_NI.int()]
    return values_NI.view(len(codes_NI), columns // run, run).mul_(scales_NP[:, :, None]).view(codes_NI.shape)


def _scales_at(scales: Tensor | NestedScales, blocks: Tensor) -> Tensor:
    """Return the float32 scales of these blocks."""
    if not isinstance(scales, NestedScales):
        return scales[blocks].float()
    assert scales.num_scales is None, "nested scales of 8 bits are bytes"
    return scales.levels[scales.codes[blocks].int()] * scales.absmax[blocks // scales.block_size] + scales.offset


def kernels_for(matrix: Tensor) -> ModuleType | None:
    """Return kernels.py for a matrix that Triton can work on; None if torch's operations have to."""
    if not (HAS_TRITON and matrix.is_cuda and matrix.dtype in FLOATS):
        return None
    from qsvd.numerics import kernels

    return kernels


def _check(what: str, value: int, allowed: tuple[int, ...], unit: str) -> None:
    if value not in allowed:
        raise ValueError(f"{what} {', '.join(map(str, allowed[:-1]))} or {allowed[-1]} {unit}, not {value}")
