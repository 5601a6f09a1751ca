"""Choose one candidate for each weight within a budget, at the least cost: an integer program (LQ-LoRA, section 3.2).

scipy.optimize.milp (HiGHS) solves it in floating point with tolerances. The bytes of its answer are therefore counted
again in whole numbers, and the budget is tightened until they fit.
"""

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from qsvd.errors import BadInput

ROUNDS = 8  # of tightening, each by twice the bytes above the budget
ROUNDOFF = 1e-12  # a relative gap below it is 0
STDOUT = 1  # the number of the process's stdout, whatever sys.stdout is

_Program = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Candidates:
    """The candidates of one weight: bytes that count against the budget, and costs, in the same order."""

    num_bytes: Sequence[int]
    costs: Sequence[float]


@dataclass(frozen=True)
class Solution:
    """One candidate for each weight.

    Args:
        picked: Number of the candidate, for each weight.
        num_bytes, cost: Sums over all weights.
        gap: (cost - bound) / cost, where no choice costs less than the bound; 0 is optimal.
        status: How the solver ended, for people.
    """

    picked: tuple[int, ...]
    num_bytes: int
    cost: float
    gap: float
    status: str


def least_bytes(weights: Sequence[Candidates]) -> int:
    """Return the smallest budget that can be met."""
    return sum(min(one.num_bytes) for one in weights)


def solve_program(
    weights: Sequence[Candidates], budget: int, *, gap: float = 1e-4, time_limit: float = 60.0
) -> Solution:
    """Return the candidates with the least total cost within the budget.

    Args:
        weights: At least one, each with at least one candidate; costs finite and not negative.
        budget: Bytes.
        gap: Relative gap at which the solver may stop.
        time_limit: Seconds after which it stops with the best answer so far.

    Raises:
        BadInput: the budget is below `least_bytes`.
    """
    least = least_bytes(weights)
    if budget < least:
        raise BadInput(f"a budget of {budget} bytes is below the {least} bytes of the smallest candidates")
    first = _by_steps(weights, budget)
    floor = sum(min(one.costs) for one in weights)
    unit = max(first.cost - floor, 0.0) / len(weights)
    if unit == 0:
        return first
    program, allowed = _reduced(weights, first), budget - least
    found, bound, status = first.picked, floor, "time limit"
    for number in range(ROUNDS):
        tried, above, status = _highs(program, allowed, unit, (gap, time_limit))
        if number == 0:  # the bound of a tightened budget is too high
            bound = floor + above
        if tried is None:
            break
        over = _total(weights, tried)[0] - budget
        if over <= 0:
            found = min(tried, first.picked, key=lambda picked: _total(weights, picked)[1])
            break
        allowed -= 2 * over
    num_bytes, cost = _total(weights, found)
    reached = max(cost - bound, 0.0) / cost if cost > 0 else 0.0
    return Solution(found, num_bytes, cost, reached if reached > ROUNDOFF else 0.0, status)


def _total(weights: Sequence[Candidates], picked: tuple[int, ...]) -> tuple[int, float]:
    pairs = list(zip(weights, picked, strict=True))
    return sum(one.num_bytes[number] for one, number in pairs), float(sum(one.costs[number] for one, number in pairs))


def _by_steps(weights: Sequence[Candidates], budget: int) -> Solution:
    """Return a first answer: from the smallest candidates up, take the step that saves most per byte, if it fits."""
    ladders = [_hull(one) for one in weights]
    steps = []
    for owner, ladder in enumerate(ladders):
        one = weights[owner]
        for place in range(1, len(ladder)):
            more = one.num_bytes[ladder[place]] - one.num_bytes[ladder[place - 1]]
            saved = one.costs[ladder[place - 1]] - one.costs[ladder[place]]
            steps.append((-saved / more, owner, place, more))
    places, left = [0] * len(weights), budget - least_bytes(weights)
    for _, owner, place, more in sorted(steps):
        if place == places[owner] + 1 and more <= left:
            places[owner], left = place, left - more
    picked = tuple(ladder[place] for ladder, place in zip(ladders, places, strict=True))
    return Solution(picked, *_total(weights, picked), gap=0.0, status="optimal")


def _front(one: Candidates) -> list[int]:
    """Return the candidates that no other one beats in both bytes and cost, by rising bytes."""
    order = sorted(range(len(one.costs)), key=lambda number: (one.num_bytes[number], one.costs[number]))
    front: list[int] = []
    for number in order:
        if not front or one.costs[number] < one.costs[front[-1]]:
            front.append(number)
    return front


def _hull(one: Candidates) -> list[int]:
    """Return the lower convex hull of the front: no line between two others is below one of these candidates."""
    hull: list[int] = []
    for number in _front(one):
        while len(hull) > 1 and not _bends(one, hull[-2], hull[-1], number):
            hull.pop()
        hull.append(number)
    return hull


def _bends(one: Candidates, first: int, middle: int, last: int) -> bool:
    """Tell whether the first step saves more per byte than the second."""
    before = (one.costs[first] - one.costs[middle]) * (one.num_bytes[last] - one.num_bytes[middle])
    return before > (one.costs[middle] - one.costs[last]) * (one.num_bytes[middle] - one.num_bytes[first])


def _reduced(weights: Sequence[Candidates], known: Solution) -> _Program:
    """Leave out candidates that another one beats, or that cost more alone than the known answer costs in all.

    Returns:
        For each candidate that is left: the number of its weight, its number among those of the weight, its bytes above
        the smallest of the weight, and its cost above the least.
    """
    floors = [min(one.costs) for one in weights]
    spare = (known.cost - sum(floors)) * (1 + 1e-9)
    kept = [
        (owner, number)
        for owner, one in enumerate(weights)
        for number in _front(one)
        if one.costs[number] - floors[owner] <= spare or number == known.picked[owner]
    ]
    num_bytes = [weights[owner].num_bytes[number] - min(weights[owner].num_bytes) for owner, number in kept]
    costs = [weights[owner].costs[number] - floors[owner] for owner, number in kept]
    owners, numbers = np.array(kept, dtype=np.int64).T
    return owners, numbers, np.array(num_bytes, dtype=np.int64), np.array(costs, dtype=np.float64)


def _highs(
    program: _Program, allowed: int, unit: float, limits: tuple[float, float]
) -> tuple[tuple[int, ...] | None, float, str]:
    """Return the picked candidates, a bound on the cost above the floors, and how it ended; (None, 0, status) for none.

    Args:
        allowed: Bytes above the smallest candidates.
        unit: Unit of cost, so that the numbers are around 1.
        limits: Relative gap and seconds.
    """
    from scipy import optimize, sparse

    owners, numbers, num_bytes, costs = program
    count, num_weights = len(owners), int(owners.max()) + 1
    one_each = sparse.csr_array((np.ones(count), (owners, np.arange(count))), shape=(num_weights, count))
    scale = max(allowed, 1)
    within = optimize.LinearConstraint(sparse.csr_array(num_bytes[None, :] / scale), -np.inf, allowed / scale)
    with silent_stdout():
        found = optimize.milp(
            costs / unit,
            integrality=np.ones(count),
            bounds=optimize.Bounds(0, 1),
            constraints=[optimize.LinearConstraint(one_each, 1, 1), within],
            options={"mip_rel_gap": limits[0], "time_limit": limits[1]},
        )
    status = {0: "optimal within the gap", 1: "time limit"}.get(found.status, str(found.message))
    if found.x is None:
        return None, 0.0, status
    best = np.full(num_weights, -1, dtype=np.int64)
    for place in np.argsort(found.x, kind="stable"):  # the largest share of each weight comes last
        best[owners[place]] = numbers[place]
    bound = found.mip_dual_bound
    return tuple(best.tolist()), 0.0 if bound is None else max(float(bound), 0.0) * unit, status


@contextmanager
def silent_stdout() -> Iterator[None]:
    """Discard what the process writes to stdout, from Python and from C.

    HiGHS of scipy 1.17 prints a line for programmers whenever it repairs an answer, even when its output is off.
    """
    sys.stdout.flush()
    kept, nowhere = os.dup(STDOUT), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, STDOUT)
        yield
    finally:
        ctypes.CDLL(None).fflush(None)  # otherwise C would print later what it still buffers
        os.dup2(kept, STDOUT)
        os.close(kept)
        os.close(nowhere)
