"""The levels of NormalFloat: quantiles of the normal distribution, an exact zero among them; and the nearest one.

NF4 of QLoRA (arXiv:2305.14314, section 3 and appendix E), for any number of bits as LQ-LoRA states it
(arXiv:2311.12023, appendix).

Shape suffixes: N = elements, L = levels.
"""

from functools import cache

import numpy
import torch
from torch import Tensor

from qsvd.numerics import codec, nf4


@cache
def levels(bits: int, device: torch.device) -> Tensor:
    """The levels, float32 [2^bits], ascending from -1 to 1; number 2^(bits - 1) - 1 is an exact zero.

    With 4 bits they are bitsandbytes' NF4. Twelve of those sixteen differ from the construction, by up to 1.8e-7: they
    were made from 1 - delta to seven digits and probabilities in float32.
    """
    found = nf4.levels() if bits == 4 else constructed(bits).float()
    return found.to(device)


def constructed(bits: int) -> Tensor:
    """The levels as the papers define them, float64 [2^bits].

    2^(bits - 1) evenly spaced probabilities from delta to 1/2, one more from 1/2 to 1 - delta, their quantiles with one
    of the two zeros dropped, and all divided by the largest.
    """
    half = 2 ** (bits - 1)
    delta = (1 / (4 * half) + 1 / (4 * half - 2)) / 2
    below = torch.linspace(delta, 0.5, half, dtype=torch.float64)
    above = torch.linspace(delta, 0.5, half + 1, dtype=torch.float64)  # mirrored, and so exact at both ends
    quantiles = torch.cat((torch.special.ndtri(below[:-1]), torch.zeros(1), -torch.special.ndtri(above[:-1]).flip(0)))
    return quantiles / quantiles[-1]


@cache
def boundaries(bits: int, device: torch.device) -> Tensor:
    """Half-way points between levels, float32 [2^bits - 1]; a value on one takes the lower code."""
    found = levels(bits, device)
    return (found[:-1] + found[1:]) / 2


def nearest(scaled_N: Tensor, bits: int) -> Tensor:
    """The code of the nearest level of each value, uint8 [N].

    Args:
        scaled_N: float32, without a NaN; beyond -1..1 the ends are nearest.
    """
    if scaled_N.is_cuda:
        return torch.bucketize(scaled_N, boundaries(bits, scaled_N.device), out_int32=True).to(torch.uint8)
    if bits == 8:
        return torch.from_numpy(_by_table(scaled_N))
    return torch.from_numpy(_by_count(scaled_N.numpy(), boundaries(bits, scaled_N.device).numpy()))


def _by_count(scaled_N: numpy.ndarray, boundaries_L: numpy.ndarray) -> numpy.ndarray:
    """How many boundaries lie below: up to 15 vector comparisons are faster than a table."""
    codes_N = (scaled_N > boundaries_L[0]).view(numpy.uint8)
    for boundary in boundaries_L[1:]:
        codes_N += (scaled_N > boundary).view(numpy.uint8)
    return codes_N


def _by_table(scaled_N: Tensor) -> numpy.ndarray:
    """8 bits: rounded to half precision, a value is an index into a table; one comparison then decides."""
    table, upper_L = _code_of_half()
    codes_N = table.take(scaled_N.half().view(torch.uint16).numpy())
    codes_N += (scaled_N.numpy() > upper_L.take(codes_N)).view(numpy.uint8)
    return codes_N


@cache
def _code_of_half() -> tuple[numpy.ndarray, numpy.ndarray]:
    """The smaller code of the float32 values that round to each half, by its bits; the boundary above each code."""
    halves = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    between_L = boundaries(8, torch.device("cpu"))
    codes = torch.bucketize(halves.float(), between_L).to(torch.uint8)
    around = between_L.half().view(torch.uint16).long()
    assert len(around.unique()) == len(around), "no two boundaries round to the same half"
    codes[around] = torch.arange(len(around), dtype=torch.uint8)
    return codes.numpy(), numpy.append(between_L.numpy(), numpy.float32(numpy.inf))


def look_up(packed: Tensor, bits: int, num_codes: int) -> Tensor:
    """The levels that packed codes stand for, float32 [num_codes]."""
    if packed.is_cuda:
        return levels(bits, packed.device)[codec.unpack(packed, bits, num_codes).int()]
    found = _several_levels(bits).take(_indices(packed.numpy(), bits))
    return torch.from_numpy(found.view(numpy.float32).reshape(-1)[:num_codes])


@cache
def _several_levels(bits: int) -> numpy.ndarray:
    """The levels of as many codes as one index of _indices holds, in one item of 8 or 16 bytes."""
    if bits == 8:
        codes = numpy.arange(65536, dtype=numpy.uint16).view(numpy.uint8).reshape(-1, 2)
    else:
        width = 12 if bits == 3 else 8
        codes = numpy.arange(2**width)[:, None] >> numpy.arange(width - bits, -1, -bits) & 2**bits - 1
    found = levels(bits, torch.device("cpu")).numpy()[codes]
    return found.view(numpy.complex64 if codes.shape[1] == 2 else numpy.complex128).reshape(-1)


def _indices(packed: numpy.ndarray, bits: int) -> numpy.ndarray:
    """Packed bytes in pieces that a table can answer: bytes, pairs of them for 8 bits, halves of three for 3 bits."""
    if bits in (2, 4):
        return packed
    size = 2 if bits == 8 else 3
    if len(packed) % size:
        packed = numpy.append(packed, numpy.zeros(-len(packed) % size, numpy.uint8))
    if bits == 8:
        return packed.view(numpy.uint16)
    first, middle, last = (packed[start::3].astype(numpy.intp) for start in range(3))
    return numpy.stack((first << 4 | middle >> 4, (middle & 15) << 8 | last), axis=1)


# Scales of blocks that leave less error than the largest magnitude does.


SHARES = (1.0, 0.85, 0.7, 0.55, 0.42)  # of the largest magnitude; twice as many gain half a percent
SMALLEST = 1e-38  # a magnitude below is as good as zero


def fitted(blocks_BE: Tensor, largest_B: Tensor, bits: int) -> Tensor:
    """The scale of each block, float32 [B], not negative; 0 where all of it is zero.

    Args:
        blocks_BE: float32, finite.
        largest_B: The largest magnitude of each.
        bits: Of a code.
    """
    levels_L = levels(bits, blocks_BE.device)
    parts_BE = blocks_BE / largest_B.clamp(min=SMALLEST)[:, None]
    best_B, most_B = torch.ones_like(largest_B), torch.zeros_like(largest_B)
    for share in SHARES:
        codes = nearest((parts_BE / share).view(-1), bits)
        chosen_BE = levels_L[codes.int()].view(parts_BE.shape)
        product_B, squares_B = (parts_BE * chosen_BE).sum(dim=1), chosen_BE.square().sum(dim=1)
        scale_B = product_B / squares_B.clamp(min=SMALLEST)
        gain_B = product_B * scale_B
        best_B = torch.where(gain_B > most_B, scale_B, best_B)
        most_B = torch.maximum(gain_B, most_B)
    return best_B * largest_B
