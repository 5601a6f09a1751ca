"""The grid of learning rates, half a decade apart, and which of them a sweep needs next."""

import math
from collections.abc import Mapping, Sequence

GRID = tuple(float(f"{digit}e{power}") for power in range(-8, 2) for digit in (1, 3))
FIRST = 5  # rates that every sweep tries at least


def first_rates(middle: float) -> tuple[float, ...]:
    """Return FIRST rates of the grid around a rate."""
    nearest = min(range(len(GRID)), key=lambda number: abs(math.log(GRID[number] / middle)))
    start = min(max(nearest - FIRST // 2, 0), len(GRID) - FIRST)
    return GRID[start : start + FIRST]


def best_rate(losses: Mapping[float, float | None]) -> float | None:
    """Return the rate of the lowest loss, the lower one of equals; None if all runs diverged, which have None."""
    found = {rate: loss for rate, loss in losses.items() if loss is not None and math.isfinite(loss)}
    return min(sorted(found), key=lambda rate: found[rate], default=None)


def next_rates(first: Sequence[float], losses: Mapping[float, float | None], *, grows: bool) -> list[float]:
    """Return the rates that a sweep still needs, given the validation losses of those that are done.

    While the best rate of all that are done is at an end, the next one there is needed; below, where all diverged.

    Args:
        grows: False tries no other rates than the first.
    """
    lacking = [rate for rate in first if rate not in losses]
    if lacking or not grows:
        return lacking
    tried = sorted(losses)
    best = best_rate(losses)
    if best in (None, tried[0]) and tried[0] > GRID[0]:
        return [GRID[GRID.index(tried[0]) - 1]]
    if best == tried[-1] and tried[-1] < GRID[-1]:
        return [GRID[GRID.index(tried[-1]) + 1]]
    return []
