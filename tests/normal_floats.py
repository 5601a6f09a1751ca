"""NormalFloat by its definition, in NumPy and SciPy and float64, with no line in common with qsvd.

The levels are those of QLoRA (arXiv:2305.14314, appendix E), stated for any number of bits in LQ-LoRA's appendix
(arXiv:2311.12023).
"""

import numpy as np
import scipy.integrate
import scipy.stats

from tests import reference

BITS = (2, 3, 4, 8)


def quantile_levels(bits):
    """The papers' construction, float64."""
    delta = (1 / 2 ** (bits + 1) + 1 / (2 ** (bits + 1) - 2)) / 2
    lower, upper = np.linspace(delta, 0.5, 2 ** (bits - 1)), np.linspace(0.5, 1 - delta, 2 ** (bits - 1) + 1)
    quantiles = scipy.stats.norm.ppf(np.concatenate((lower, upper[1:])))
    return quantiles / np.abs(quantiles).max()


def levels(bits):
    """As they are stored: float32 numbers, in float64; NF4 as it was published."""
    return reference.NF4_LEVELS if bits == 4 else quantile_levels(bits).astype(np.float32).astype(np.float64)


def packed_bits(codes, bits):
    """Codes below 2^bits as one stream of bits, the most significant first."""
    return np.packbits(np.unpackbits(codes.astype(np.uint8)[:, None], axis=1)[:, 8 - bits :].reshape(-1))


def unpacked_bits(packed, bits, count):
    """The reverse, bit by bit."""
    stream = np.unpackbits(packed)[: count * bits].reshape(count, bits).astype(np.int64)
    return stream @ (1 << np.arange(bits - 1, -1, -1))


def scales_of(tensors, blocks, nested_bits=None, nested_block=None):
    """The scale of each block from what is stored, float64."""
    if nested_bits is None:
        return tensors["absmax"].double().numpy()
    codes = unpacked_bits(tensors["absmax_codes"].numpy(), nested_bits, blocks)
    largest = reference.spread(tensors["absmax"].numpy(), blocks, nested_block)
    return codes / (2**nested_bits - 1) * largest + float(tensors["offset"])


def gaussian_error(bits, block):
    """Expected relative Frobenius error of Gaussian noise in blocks that are scaled by their largest magnitude.

    Given the largest, m, which is kept, the others are normal within -m..m: their expected squared distance to
    the nearest level, over the distribution of m.
    """
    table = levels(bits)
    edges = np.concatenate(([-1.0], (table[:-1] + table[1:]) / 2, [1.0]))
    normal = scipy.stats.norm

    def squares(m):
        low, high, level = edges[:-1] * m, edges[1:] * m, table * m
        mass = normal.cdf(high) - normal.cdf(low)
        first = normal.pdf(low) - normal.pdf(high)
        second = mass + low * normal.pdf(low) - high * normal.pdf(high)
        inside = normal.cdf(m) - normal.cdf(-m)
        density = block * inside ** (block - 1) * 2 * normal.pdf(m)
        return density * (second - 2 * level * first + level**2 * mass).sum() / inside

    mean, _ = scipy.integrate.quad(squares, 0, 9, limit=200)
    return (mean * (block - 1) / block) ** 0.5
