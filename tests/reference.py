"""What the tests judge by: the definitions in NumPy and SciPy, float64, with no line in common with qsvd.

NF4 is defined in QLoRA (arXiv:2305.14314, section 3) and its appendix E, the dynamic 8-bit map of double quantization
in arXiv:1511.04561, the loops in arXiv:2404.02948 (QPiSSA) and arXiv:2310.08659 (LoftQ).
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import scipy.linalg

NF4_LEVELS = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)
BOUNDARIES = (NF4_LEVELS[:-1] + NF4_LEVELS[1:]) / 2
HALF_GAP = np.diff(NF4_LEVELS).max() / 2  # of a scale: the most that rounding to the nearest level can cost


def decaying(rows: int, columns: int, *, power: float, seed: int = 0) -> np.ndarray:
    """A float32 matrix with singular values 1, 2^-power, 3^-power, ... and random singular vectors."""
    left, right = _bases(rows, columns, seed)
    return ((left * np.arange(1, min(rows, columns) + 1.0) ** -power) @ right.T).astype(np.float32)


@cache
def _bases(rows: int, columns: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng, side = np.random.default_rng(seed), min(rows, columns)
    return np.linalg.qr(rng.standard_normal((rows, side)))[0], np.linalg.qr(rng.standard_normal((columns, side)))[0]


def gaussian(rows: int, columns: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def block_scales(matrix: np.ndarray, block_size: int) -> np.ndarray:
    """The largest magnitude of each block of the flattened matrix."""
    flat = np.abs(matrix.reshape(-1).astype(np.float64))
    return np.maximum.reduceat(flat, np.arange(0, flat.size, block_size))


def spread(scales: np.ndarray, size: int, block_size: int) -> np.ndarray:
    """One scale for each element."""
    return scales.astype(np.float64)[np.arange(size) // block_size]


def nf4_indices(matrix: np.ndarray, block_size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """The nearest level of every element (the lower one of two equally near) and the scale of every block."""
    scales = block_scales(matrix, block_size)
    per_element = spread(scales, matrix.size, block_size)
    scaled = matrix.reshape(-1).astype(np.float64) / np.where(per_element > 0, per_element, 1.0)
    return np.searchsorted(BOUNDARIES, scaled, side="left"), scales


def nf4_decode(indices: np.ndarray, scales: np.ndarray, shape: tuple[int, int], block_size: int = 64) -> np.ndarray:
    return (NF4_LEVELS[indices] * spread(scales, indices.size, block_size)).reshape(shape)


def unpacked(codes: np.ndarray, size: int) -> np.ndarray:
    """The 4-bit indices of packed bytes, high half first."""
    return np.stack((codes // 16, codes % 16), axis=-1).reshape(-1)[:size].astype(np.int64)


def dynamic_map() -> np.ndarray:
    """The signed dynamic 8-bit type: decades from 1e-6 to 1, each cut into twice as many means as the one below."""
    positive = []
    for exponent in range(7):
        edges = np.linspace(0.1, 1, 2**exponent + 1)
        positive.append(10.0 ** (exponent - 6) * (edges[:-1] + edges[1:]) / 2)
    positive = np.concatenate(positive)
    return np.sort(np.concatenate((-positive, [0.0], positive, [1.0])))


def nest(scales: np.ndarray, block_size: int = 256) -> np.ndarray:
    """Scales after double quantization: their mean taken off, then rounded to the dynamic map in blocks."""
    offset = scales.mean()
    rest = scales - offset
    largest = spread(block_scales(rest, block_size), rest.size, block_size)
    levels = dynamic_map()
    scaled = rest / np.where(largest > 0, largest, 1.0)
    nearest = np.searchsorted((levels[:-1] + levels[1:]) / 2, scaled, side="left")
    return levels[nearest] * largest + offset


def nf4_round_trip(matrix: np.ndarray, *, double_quant: bool, block_size: int = 64) -> np.ndarray:
    indices, scales = nf4_indices(matrix, block_size)
    return nf4_decode(indices, nest(scales) if double_quant else scales, matrix.shape, block_size)


def truncated(matrix: np.ndarray, rank: int) -> np.ndarray:
    """The best rank-r approximation (Eckart and Young, 1936), float64."""
    left, values, right = scipy.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def singular_values(matrix: np.ndarray) -> np.ndarray:
    return scipy.linalg.svdvals(matrix.astype(np.float64))


def tail(matrix: np.ndarray, rank: int) -> float:
    """The Frobenius norm of what no rank-r matrix can reach."""
    return float(np.linalg.norm(singular_values(matrix)[rank:]))


@dataclass(frozen=True)
class Pass:
    """One pass of a loop: ||W - Q - BA||_F, Q, BA, and how near to a boundary the nearest scaled value lay."""

    distance: float
    residual: np.ndarray
    low_rank: np.ndarray
    clearance: float


def alternation(weight: np.ndarray, *, rank: int, passes: int, order: str, end: str) -> list[Pass]:
    """The passes of QPiSSA (order svd, end quantize), LoftQ (the reverse) and kin: NF4 in blocks of 64, full SVDs."""
    weight = weight.astype(np.float64)
    low_rank = truncated(weight, rank) if order == "svd" else np.zeros_like(weight)
    found = []
    for _ in range(passes):
        target = weight - low_rank
        scaled = target.reshape(-1) / spread(block_scales(target, 64), target.size, 64)
        clearance = float(np.abs(scaled[:, None] - BOUNDARIES).min())
        residual = nf4_round_trip(target, double_quant=False)
        refitted = truncated(weight - residual, rank)
        kept = refitted if end == "svd" else low_rank
        found.append(Pass(float(np.linalg.norm(weight - residual - kept)), residual, kept, clearance))
        low_rank = refitted
    return found
