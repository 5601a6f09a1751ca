"""Uniform symmetric 4 bits as compressed-tensors packs them: whole numbers from -8 to 7 times a scale in bfloat16.

Groups run along the inputs and never cross rows, so that a group size divides the number of columns. transformers with
the package compressed-tensors and vLLM decode what this file encodes; a negative scale mirrors the levels, and both
multiply by it. With scales from the largest magnitudes, codes and scales are those of compressed-tensors'
calculate_qparams (the largest magnitude over 7.5) and round-to-nearest, rounded once from float32.

In a byte the first code has the low bits. So four bytes are the int32 in which compressed-tensors keeps eight codes.

Shape suffixes: O = out features, I = in features, B = groups, E = elements of one group, N = elements, P = bytes.
"""

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy
import torch
from torch import Tensor

from qsvd.numerics.codec import SMALLEST_SCALE, Codec, NestedScales, PackedBlocks
from qsvd.numerics.normal_float import RUN, kernels_for

GROUPS = (32, 64, 128)
NAME = re.compile(r"int4-(\d+)")
LEAST, MOST = -8, 7
HALF_RANGE = (MOST - LEAST) / 2  # the largest magnitude over this is the scale: 7.5, which is cut to the last level


class Int4(Codec):
    """Whole numbers of 4 bits in groups of `block_size` inputs.

    Args:
        block_size: Elements of a row that share a scale: 32, 64 or 128.

    Raises:
        ValueError: block_size has another value.
    """

    FORMS = f"int4-<group> with groups of {', '.join(map(str, GROUPS))} (compressed-tensors')"
    scale_dtype = torch.bfloat16
    reach = float(MOST)
    low_first = True

    def __init__(self, block_size: int = 128):
        if block_size not in GROUPS:
            raise ValueError(f"groups have {', '.join(map(str, GROUPS[:-1]))} or {GROUPS[-1]} inputs, not {block_size}")
        self.block_size = block_size
        self.name = f"int4-{block_size}"

    @classmethod
    def from_name(cls, name: str) -> "Int4 | None":
        found = NAME.fullmatch(name)
        return None if found is None else cls(int(found[1]))

    def fits(self, columns: int) -> bool:
        """Tell whether a matrix with this number of columns has whole groups."""
        return columns % self.block_size == 0

    def encode(self, matrix_OI: Tensor) -> PackedBlocks:
        """Quantize a finite float32, bfloat16 or float16 [O, I] matrix.

        Raises:
            ValueError: matrix_OI has another dtype or number of dimensions, holds a NaN or an infinity, or its columns
                do not divide by the group size.
        """
        self.check_encodable(matrix_OI)
        rows, columns = matrix_OI.shape
        if not self.fits(columns):
            raise ValueError(f"{self.name} needs columns that divide by {self.block_size}, and there are {columns}")
        blocks_BE = matrix_OI.reshape(-1, self.block_size)
        scales_B = torch.empty(len(blocks_BE), dtype=self.scale_dtype, device=matrix_OI.device)
        codes_BE = torch.empty(blocks_BE.shape, dtype=torch.uint8, device=matrix_OI.device)
        for run in self._runs(blocks_BE):
            part_BE = blocks_BE[run].float()
            scales_B[run] = part_BE.abs().amax(dim=1) / HALF_RANGE
            divisor_B = scales_B[run].float().clamp(min=SMALLEST_SCALE)
            codes_BE[run] = self.nearest(part_BE / divisor_B[:, None])
        if not torch.isfinite(scales_B).all():
            raise ValueError(f"{self.name} cannot encode a matrix that holds a NaN or an infinity")
        return self.packed(codes_BE.view(-1), scales_B, (rows, columns))

    def packed(self, codes_N: Tensor, scales: Tensor | NestedScales, shape: tuple[int, int]) -> PackedBlocks:
        pairs_P2 = codes_N.view(-1, 2)
        return PackedBlocks(pairs_P2[:, 0] | pairs_P2[:, 1] << 4, scales, shape, self)

    def decode_into(self, packed: PackedBlocks, out_OI: Tensor) -> None:
        if kernels := kernels_for(out_OI):
            kernels.decode_into(packed, out_OI.view(-1))
            return
        assert isinstance(packed.scales, Tensor), "scales are not nested"
        out_BE, codes_BP = out_OI.view(-1, self.block_size), packed.codes.view(-1, self.block_size // 2)
        for run in self._runs(out_BE):
            numbers_BE = _numbers(codes_BP[run]).view(-1, self.block_size)
            torch.mul(numbers_BE, packed.scales[run, None].float(), out=out_BE[run])

    def levels(self, device: torch.device) -> Tensor:
        return _levels(device)

    def nearest(self, scaled_N: Tensor) -> Tensor:
        """Return the code of the nearest level of each value, uint8; of two that are as near, the even number."""
        return scaled_N.round().clamp_(LEAST, MOST).sub_(LEAST).to(torch.uint8)

    def _runs(self, blocks_BE: Tensor) -> Iterator[slice]:
        step = RUN[blocks_BE.device.type] // self.block_size
        return (slice(first, first + step) for first in range(0, len(blocks_BE), step))


@cache
def _levels(device: torch.device) -> Tensor:
    return torch.arange(LEAST, MOST + 1, dtype=torch.float32, device=device)


def _numbers(codes: Tensor) -> Tensor:
    """Return the numbers of packed codes, float32, flat."""
    if codes.is_cuda:
        return torch.stack((codes & 15, codes >> 4), dim=-1).float().add_(LEAST).view(-1)
    return torch.from_numpy(_pairs().take(codes.numpy()).view(numpy.float32).reshape(-1))


@cache
def _pairs() -> Any:
    """Return a table: a byte -> the numbers of its two codes, as one item of 8 bytes."""
    both = numpy.arange(256)
    numbers = numpy.stack((both & 15, both >> 4), axis=1).astype(numpy.float32) + LEAST
    return numbers.view(numpy.complex64).reshape(-1)
