"""Ranks by a rule with one knob, as the field has them: turned until the budget is met best from below.

SARA (arXiv:2408.03290): a weight's rank is the number of its leading singular values whose sum stays below a share of
the sum of all. PRILoRA (arXiv:2401.11316): the rank rises in a line with depth.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import accumulate

from qsvd.plan.model import WeightSpec

HALVINGS = 60  # of the knob: more than a double can tell apart
LAST_TO_FIRST = 3  # rank of the last layer over that of the first: 12 over 4, PRILoRA's own

Ranks = Callable[[float], list[int]]


def turned(ranks: Ranks, most: float, num_bytes: Callable[[Sequence[int]], int], budget: int) -> list[int] | None:
    """The ranks at the highest setting that the budget holds; None where even 0 is too much.

    Args:
        ranks: Of every weight, at a setting of the knob in 0..most; higher settings never lower a rank.
        num_bytes: What the weights take at such ranks.
        budget: Bytes.
    """
    low, high = 0.0, most
    if num_bytes(ranks(low)) > budget:
        return None
    if num_bytes(ranks(high)) <= budget:
        return ranks(high)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if num_bytes(ranks(middle)) <= budget:
            low = middle
        else:
            high = middle
    return ranks(low)


def sara(spectra: Sequence[tuple[Sequence[float], float]]) -> Ranks:
    """SARA's ranks at a share T in 0..1.

    Args:
        spectra: Of every weight, its leading singular values, as many as its rank may be, and the sum of all.
    """
    sums = [(list(accumulate(values)), total) for values, total in spectra]
    return lambda share: [bisect_left(reached, share * total) for reached, total in sums]


def prilora(weights: Sequence[WeightSpec], most: Sequence[int]) -> Ranks:
    """PRILoRA's ranks at a rank of the first layer, a real number.

    Args:
        most: The highest rank of every weight; what the line has above it is cut.
    """
    first, last = min(spec.layer for spec in weights), max(spec.layer for spec in weights)
    depths = [(spec.layer - first) / max(last - first, 1) for spec in weights]
    slope = LAST_TO_FIRST - 1
    return lambda start: [
        min(round(start + slope * start * depth), limit) for depth, limit in zip(depths, most, strict=True)
    ]
