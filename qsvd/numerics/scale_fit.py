"""Scales of blocks that leave less error than the largest magnitude does.

With the codes fixed, the best scale of a block x of levels q is <x, q> / <q, q>, and what it leaves of ||x||^2 falls by
<x, q>^2 / <q, q>. Codes are tried for a few shares of the largest magnitude, and the best of these pairs is kept. Any
scale is legal in the format. Of Gaussian noise in blocks of 64 this leaves 0.374 instead of 0.564 with 2 bits, 0.177
instead of 0.197 with 3, and 0.087 instead of 0.092 with 4.

Shape suffixes: B = blocks, E = elements of one block.
"""

import torch
from torch import Tensor

from qsvd.numerics import codebook

SHARES = (1.0, 0.85, 0.7, 0.55, 0.42)  # of the largest magnitude; twice as many gain half a percent
SMALLEST = 1e-38  # a magnitude below is as good as zero


def fitted(blocks_BE: Tensor, largest_B: Tensor, bits: int) -> Tensor:
    """The scale of each block, float32 [B], not negative; 0 where all of it is zero.

    Args:
        blocks_BE: float32, finite.
        largest_B: The largest magnitude of each.
        bits: Of a code.
    """
    levels = codebook.levels(bits, blocks_BE.device)
    parts_BE = blocks_BE / largest_B.clamp(min=SMALLEST)[:, None]
    best_B, most_B = torch.ones_like(largest_B), torch.zeros_like(largest_B)
    for share in SHARES:
        codes = codebook.nearest((parts_BE / share).view(-1), bits)
        chosen_BE = levels[codes.int()].view(parts_BE.shape)
        product_B, squares_B = (parts_BE * chosen_BE).sum(dim=1), chosen_BE.square().sum(dim=1)
        scale_B = product_B / squares_B.clamp(min=SMALLEST)
        gain_B = product_B * scale_B
        best_B = torch.where(gain_B > most_B, scale_B, best_B)
        most_B = torch.maximum(gain_B, most_B)
    return best_B * largest_B
