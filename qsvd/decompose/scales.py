"""Scales of least squared error for the blocks of a matrix.

Shape suffixes: O = out features, I = in features, B = blocks, E = elements of one block, N = elements.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from qsvd.numerics import codebook
from qsvd.numerics.codec import Codec

REFITS = 3  # of a scale, after the best of several was taken
WIDE = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
SHARES = {  # bits -> shares of the largest magnitude that are tried as scales; three times as many gain 0.2 %
    2: (1.0, 0.92, 0.84, 0.76, 0.68, 0.6, 0.52, 0.44, 0.36),
    3: (1.0, 0.93, 0.86, 0.79, 0.72, 0.65, 0.58, 0.5),
    4: WIDE,
    8: WIDE,
}
RUN = {"cpu": 1 << 20, "cuda": 1 << 26}  # elements whose scales are chosen at a time


def in_blocks(flat_N: Tensor, block_size: int) -> Tensor:
    """Return numbers in rows of one block; zeros fill the last one."""
    return pad(flat_N, (0, -len(flat_N) % block_size)).view(-1, block_size)


def scales_of(blocks_BE: Tensor, codec: Codec, weights_I: Tensor | None, columns: int) -> Tensor:
    """Return the scales of least weighted squared error, float32 [B]."""
    scales_B = torch.empty(len(blocks_BE), device=blocks_BE.device)
    for run in runs_of(blocks_BE):
        parts_BE, weights_BE = blocks_BE[run], None
        if weights_I is not None:
            first = run.start * codec.block_size
            places = torch.arange(first, first + parts_BE.numel(), device=parts_BE.device)
            weights_BE = weights_I[places % columns].view(parts_BE.shape)
        scales_B[run] = fitted(parts_BE, codec, weights_BE)
    return scales_B


def runs_of(blocks_BE: Tensor) -> Iterator[slice]:
    """Yield blocks that are worked on together."""
    step = max(RUN[blocks_BE.device.type] // blocks_BE.shape[1], 1)
    yield from (slice(first, first + step) for first in range(0, len(blocks_BE), step))


def fitted(blocks_BE: Tensor, codec: Codec, weights_BE: Tensor | None) -> Tensor:
    search = codebook.Search(SHARES[codec.bits], codec.has_signed_scales, REFITS)
    largest_B = blocks_BE.abs().amax(dim=1) / codec.reach
    return codebook.fitted(blocks_BE, largest_B, codec, search, weights_BE)


def of_numbers(scales_B: Tensor, size: int, rows: int, columns: int) -> Tensor:
    """Return the scale of every number, [I, O]."""
    return scales_B.repeat_interleave(size)[: rows * columns].view(rows, columns).t().contiguous()


def inverse(scales_B: Tensor) -> Tensor:
    """Return 1 / scale; 0 for a scale of zero, whose numbers take the code of zero."""
    return torch.where(scales_B == 0, 0, 1 / scales_B)
