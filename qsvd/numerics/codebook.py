"""The levels of NormalFloat, and for each value the nearest level: quantiles of the normal distribution and an exact 0.

NF4 of QLoRA (arXiv:2305.14314, section 3 and appendix E); LQ-LoRA (arXiv:2311.12023, appendix) states the levels for
any number of bits. `fitted` chooses block scales that leave less error than the largest magnitude does.

Shape suffixes: B = blocks, E = elements of one block, N = elements, L = levels.
"""

from dataclasses import dataclass
from functools import cache

import numpy
import torch
from torch import Tensor

from qsvd.numerics import codec

CPU = torch.device("cpu")
FEW_VALUES = 1000  # for which one call that searches takes less time than many that compare
TOGETHER = 1 << 13  # values whose comparisons stay in the cache, so that one call makes all of them
NF4_LEVELS = (  # bitsandbytes' table; it differs from `constructed` in twelve levels, by up to 1.8e-7
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@dataclass(frozen=True)
class Search:
    """How a block's scale is searched.

    Args:
        shares: Shares of the largest magnitude that are tried.
        signed: Whether scales may be negative, which mirrors the levels; else they are at least 0.
        refits: How often codes are chosen again for the best scale, and the scale for these codes (Lloyd, 1982).
    """

    shares: tuple[float, ...]
    signed: bool = False
    refits: int = 0


FEW = Search((1.0, 0.85, 0.7, 0.55, 0.42))  # twice as many gain half a percent


@cache
def levels(bits: int, device: torch.device = CPU) -> Tensor:
    """Return the levels, float32 [2^bits], ascending from -1 to 1; level 2^(bits - 1) - 1 is an exact zero.

    With 4 bits they are bitsandbytes' NF4, whose table was made from 1 - delta to seven digits and probabilities in
    float32.
    """
    return (torch.tensor(NF4_LEVELS) if bits == 4 else constructed(bits).float()).to(device)


def constructed(bits: int) -> Tensor:
    """Return the levels as the papers define them, float64 [2^bits].

    They are the quantiles of 2^(bits - 1) evenly spaced probabilities from delta to 1/2 and of one more from 1/2 to
    1 - delta, without one of the two zeros, all divided by the largest.
    """
    half = 2 ** (bits - 1)
    delta = (1 / (4 * half) + 1 / (4 * half - 2)) / 2
    below = torch.linspace(delta, 0.5, half, dtype=torch.float64)
    above = torch.linspace(delta, 0.5, half + 1, dtype=torch.float64)  # mirrored, so that both ends are exact
    quantiles = torch.cat((torch.special.ndtri(below[:-1]), torch.zeros(1), -torch.special.ndtri(above[:-1]).flip(0)))
    return quantiles / quantiles[-1]


@cache
def boundaries(bits: int, device: torch.device = CPU) -> Tensor:
    """Return the midpoints between levels, float32 [2^bits - 1]; a value on a midpoint takes the lower code."""
    found = levels(bits, device)
    return (found[:-1] + found[1:]) / 2


def nearest(scaled_N: Tensor, bits: int) -> Tensor:
    """Return the code of the nearest level of each value, uint8 [N].

    Args:
        scaled_N: float32, without a NaN; values outside -1..1 take the first or the last code.
    """
    if scaled_N.is_cuda or len(scaled_N) < FEW_VALUES:
        return torch.bucketize(scaled_N, boundaries(bits, scaled_N.device), out_int32=True).to(torch.uint8)
    if bits == 8:
        return torch.from_numpy(_by_table(scaled_N))
    return torch.from_numpy(_by_count(scaled_N.numpy(), boundaries(bits).numpy()))


def _by_count(scaled_N: numpy.ndarray, boundaries_L: numpy.ndarray) -> numpy.ndarray:
    """Count the boundaries below each value: up to 15 vector comparisons are faster than a table."""
    if len(scaled_N) <= TOGETHER:
        is_above_LN = scaled_N > boundaries_L[:, None]
        return numpy.add.reduce(is_above_LN.view(numpy.uint8), axis=0, dtype=numpy.uint8)
    codes_N = (scaled_N > boundaries_L[0]).view(numpy.uint8)
    for boundary in boundaries_L[1:]:
        codes_N += (scaled_N > boundary).view(numpy.uint8)
    return codes_N


def _by_table(scaled_N: Tensor) -> numpy.ndarray:
    """Look up the code of each value, rounded to half precision, in a table; one comparison then corrects it."""
    table, upper_L = _code_of_half()
    codes_N = table.take(scaled_N.half().view(torch.uint16).numpy())
    codes_N += (scaled_N.numpy() > upper_L.take(codes_N)).view(numpy.uint8)
    return codes_N


@cache
def _code_of_half() -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return two tables for 8 bits: half -> the smallest code of the float32 values that round to it; code -> boundary.

    The first is indexed by the bits of the half. The second has the boundary above each code.
    """
    halves = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    between_L = boundaries(8)
    codes = torch.bucketize(halves.float(), between_L).to(torch.uint8)
    around = between_L.half().view(torch.uint16).long()
    assert len(around.unique()) == len(around), "no two boundaries round to the same half"
    codes[around] = torch.arange(len(around), dtype=torch.uint8)
    return codes.numpy(), numpy.append(between_L.numpy(), numpy.float32(numpy.inf))


def look_up(packed: Tensor, bits: int, num_codes: int) -> Tensor:
    """Return the levels of packed codes, float32 [num_codes]."""
    if packed.is_cuda:
        return levels(bits, packed.device)[codec.unpack(packed, bits, num_codes).int()]
    found = _several_levels(bits).take(_indices(packed.numpy(), bits))
    return torch.from_numpy(found.view(numpy.float32).reshape(-1)[:num_codes])


@cache
def _several_levels(bits: int) -> numpy.ndarray:
    """Return a table: an index of `_indices` -> the levels of its 2 or 4 codes as one item of 8 or 16 bytes."""
    if bits == 8:
        codes = numpy.arange(65536, dtype=numpy.uint16).view(numpy.uint8).reshape(-1, 2)
    else:
        width = 12 if bits == 3 else 8
        codes = numpy.arange(2**width)[:, None] >> numpy.arange(width - bits, -1, -bits) & 2**bits - 1
    found = levels(bits).numpy()[codes]
    return found.view(numpy.complex64 if codes.shape[1] == 2 else numpy.complex128).reshape(-1)


def _indices(packed: numpy.ndarray, bits: int) -> numpy.ndarray:
    """Cut packed bytes into table indices: bytes; pairs of bytes for 8 bits; halves of three bytes for 3 bits."""
    if bits in (2, 4):
        return packed
    size = 2 if bits == 8 else 3
    if len(packed) % size:
        packed = numpy.append(packed, numpy.zeros(-len(packed) % size, numpy.uint8))
    if bits == 8:
        return packed.view(numpy.uint16)
    first, middle, last = (packed[start::3].astype(numpy.intp) for start in range(3))
    return numpy.stack((first << 4 | middle >> 4, (middle & 15) << 8 | last), axis=1)


def fitted(
    blocks_BE: Tensor, largest_B: Tensor, of: codec.Codec, search: Search = FEW, weights_BE: Tensor | None = None
) -> Tensor:
    """Return the scale of each block with the least error of those that are tried, float32 [B].

    For each share of the largest magnitude, codes are chosen, and then the best scale for these codes. The scale of a
    block of zeros is 0.

    Args:
        blocks_BE: float32, finite.
        largest_B: The largest magnitude of each block, divided by the `reach` of the codec.
        of: The codec whose levels are used.
        search: What is tried.
        weights_BE: Weights of the squared errors, not negative, of a shape that broadcasts; None is 1.
    """
    parts_BE = blocks_BE / largest_B.clamp(min=codec.SMALLEST_SCALE)[:, None]
    best_B, most_B = torch.ones_like(largest_B), torch.zeros_like(largest_B)
    signs = (1, -1) if search.signed else (1,)
    tries = [sign * share for share in search.shares for sign in signs]
    for tried in (*tries, *[None] * search.refits):
        tried_B = best_B if tried is None else torch.full_like(best_B, tried)
        scale_B, gain_B = _refitted(parts_BE, tried_B, of, weights_BE)
        best_B = torch.where(gain_B > most_B, scale_B, best_B)
        most_B = torch.maximum(gain_B, most_B)
    return best_B * largest_B


def _refitted(parts_BE: Tensor, tried_B: Tensor, of: codec.Codec, weights_BE: Tensor | None) -> tuple[Tensor, Tensor]:
    """Choose codes for some scales; return the best scales for these codes, and how much they lower the squared error
    below that of zeros."""
    codes = of.nearest((parts_BE / tried_B[:, None]).view(-1))
    chosen_BE = of.values(codes).view(parts_BE.shape)
    weighted_BE = chosen_BE if weights_BE is None else chosen_BE * weights_BE
    product_B, squares_B = (torch.linalg.vecdot(one_BE, weighted_BE) for one_BE in (parts_BE, chosen_BE))
    scale_B = product_B / squares_B.clamp(min=codec.SMALLEST_SCALE)
    return scale_B, product_B * scale_B
