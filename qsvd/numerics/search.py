"""The largest number with which something fits, if all smaller ones fit too."""

import math
from collections.abc import Callable


def most(least: int, limit: int, fits: Callable[[int], bool]) -> int | None:
    """Return the largest number of least..limit that fits, if all below it fit too; None if none fits."""
    if limit < least:
        return None
    if fits(limit):
        return limit
    if not fits(least):
        return None
    low, high = least, limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def last_spared(limit: int, left: Callable[[int], int]) -> int | None:
    """Return the largest number of 1..limit that leaves 0 bytes or more; None if none does.

    Bytes grow about as a square of the number, so that few numbers are tried: those where a square through the three
    smallest values is 0, and the middle by ratio, where the last one left more than half of the numbers.
    """
    if limit < 1:
        return None
    low, high = 1, limit
    seen = {high: left(high)}
    if seen[high] >= 0:
        return high
    if low == high or (first := left(low)) < 0:
        return None
    seen[low] = first
    is_slow = False
    while high - low > 1:
        guess = math.isqrt(low * high) if is_slow else _zero(seen)
        guess = min(max(guess, low + 1), high - 1)
        seen[guess] = left(guess)
        width = high - low
        low, high = (guess, high) if seen[guess] >= 0 else (low, guess)
        is_slow = not is_slow and 2 * (high - low) > width
    return low


def _zero(seen: dict[int, int]) -> int:
    """Return the last number before a square, or a line, through the three smallest values is negative."""
    near = sorted(seen, key=lambda number: abs(seen[number]))[:3]
    values = [float(seen[number]) for number in near]
    slope = (values[1] - values[0]) / (near[1] - near[0])
    if len(near) == 2:
        return int(near[0] - values[0] / slope)
    bend = ((values[2] - values[0]) / (near[2] - near[0]) - slope) / (near[2] - near[1])
    slope -= bend * (near[1] - near[0])  # at near[0]
    root = math.sqrt(max(slope**2 - 4 * bend * values[0], 0))
    return int(near[0] + 2 * values[0] / (root - slope)) if root > slope else near[0]
