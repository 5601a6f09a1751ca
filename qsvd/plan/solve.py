"""Which codec and rank every weight gets, from the measured errors of its candidates and one budget for all.

both      bits and ranks by the integer program of LQ-LoRA (arXiv:2311.12023), with ranks as a second dimension
bits      bits alone, as LQ-LoRA: every weight has the same rank
uniform   one codec and one rank for all weights, the pair that costs least
sara      one codec; ranks by singular values (arXiv:2408.03290)
prilora   one codec; ranks by depth (arXiv:2401.11316)
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import exp, log, prod, sqrt
from typing import Literal

from qsvd.decompose.candidates import CandidateErrors
from qsvd.errors import BadInput
from qsvd.numerics.names import codec_named
from qsvd.plan.allocation import Allocation, Choice
from qsvd.plan.budget import Budget
from qsvd.plan.grid import Count, Grid, counted_bytes
from qsvd.plan.program import Candidates, solve_program
from qsvd.plan.weights import WeightSpec

# Ranks by a rule with one knob, as the field has them: turned until the budget is met best from below.


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


Allocator = Literal["both", "bits", "uniform", "sara", "prilora"]


@dataclass(frozen=True)
class AllocationProblem:
    """What is to be allocated, and by which rules.

    Args:
        weights: In model order.
        grid: What is tried on each.
        budget: For all of them.
        factor_bytes: Of a stored number of the factors.
        count: What counts against the budget.
        gap, time_limit: Of the integer program; relative, and in seconds.
    """

    weights: Sequence[WeightSpec]
    grid: Grid
    budget: Budget
    factor_bytes: int
    count: Count = "stored"
    gap: float = 1e-4
    time_limit: float = 60.0

    def num_bytes(self, spec: WeightSpec, choice: Choice) -> int:
        """What a choice takes of the budget."""
        return counted_bytes(choice, spec.shape, self.factor_bytes, self.count)


@dataclass(frozen=True)
class AllocationResult:
    """An allocation and what is expected of it.

    Args:
        allocation: With the expected relative errors.
        squares: Expected squared error of each weight, without its importance.
        norms: Squared norm of each weight, counted in the same way.
        num_bytes: Counted against the budget.
        gap: Of the integer program, relative; None where none was solved.
        status: How it ended, in words.
    """

    allocation: Allocation
    squares: Mapping[str, float]
    norms: Mapping[str, float]
    num_bytes: int
    gap: float | None
    status: str


def check_feasible(task: AllocationProblem, allocator: Allocator) -> None:
    """Refuse a budget that no choice meets, before anything is measured.

    Raises:
        BadInput: with the least budget that would do, in the same unit.
    """
    smallest = [min(task.num_bytes(spec, choice) for choice in _tried(task, allocator, spec)) for spec in task.weights]
    what, other = "with their smallest codecs and ranks", "smaller --codecs or --ranks"
    if allocator == "bits":
        what, other = f"with their smallest codecs and rank {task.grid.rank}", "a lower --rank, or --allocator both"
    needed, budget = sum(smallest), task.budget
    if needed > budget.num_bytes:
        advice = f"give at least that, or {other}" if needed <= budget.most_bytes else f"give {other}"
        raise BadInput(
            f"--budget {budget.text} is too small: {what}, the {len(task.weights)} weights need "
            f"{budget.enough(needed)}; {advice}"
        )


def solve(
    task: AllocationProblem,
    allocator: Allocator,
    measured: Mapping[str, CandidateErrors],
    importances: Mapping[str, float] | None = None,
) -> AllocationResult:
    """The best choice for every weight that the allocator finds.

    Args:
        measured: By module; of the codecs and ranks of the grid.
        importances: By module, what a squared error is multiplied with, above 0; None is 1 for all.

    Raises:
        BadInput: the budget is too small.
    """
    check_feasible(task, allocator)
    factors = [1.0 if importances is None else importances[spec.module] for spec in task.weights]
    if allocator in ("both", "bits"):
        return _by_program(task, allocator, measured, factors)
    tried = _uniforms(task) if allocator == "uniform" else _scheduled(task, allocator, measured)
    return _cheapest(task, tried, measured, factors)


def over_norms(weights: Sequence[WeightSpec], measured: Mapping[str, CandidateErrors]) -> dict[str, float]:
    """Importances by which errors are relative: of two weights of one size a tenth of each counts the same."""
    norms = {spec.module: measured[spec.module].norm / prod(spec.shape) for spec in weights}
    return {module: 1 / norm if norm > 0 else 1.0 for module, norm in norms.items()}


def expected(measured: CandidateErrors, codec: int, rank: int) -> float:
    """The squared error at the codec of this number and any rank up to the highest measured one.

    Between two measured ranks its logarithm is a line.
    """
    if rank in measured.ranks:
        return measured.squares[measured.ranks.index(rank)][codec]
    above = next(place for place, other in enumerate(measured.ranks) if other > rank)
    low, high = (measured.squares[place][codec] for place in (above - 1, above))
    start, stop = measured.ranks[above - 1 : above + 1]
    part = (rank - start) / (stop - start)
    if min(low, high) <= 0:
        return low + part * (high - low)
    return exp(log(low) + part * (log(high) - log(low)))


def relative(squares: Mapping[str, float], norms: Mapping[str, float], modules: Iterable[str]) -> float:
    """The error of some weights taken as one, over their norm; 0 where they are all zero."""
    modules = list(modules)
    norm = sum(norms[module] for module in modules)
    return sqrt(sum(squares[module] for module in modules) / norm) if norm > 0 else 0.0


def _by_program(
    task: AllocationProblem, allocator: Allocator, measured: Mapping[str, CandidateErrors], importances: Sequence[float]
) -> AllocationResult:
    choices = [_tried(task, allocator, spec) for spec in task.weights]
    options = []
    for spec, tried, importance in zip(task.weights, choices, importances, strict=True):
        costs = [importance * _square(task, measured[spec.module], choice) for choice in tried]
        options.append(Candidates([task.num_bytes(spec, choice) for choice in tried], costs))
    solution = solve_program(options, task.budget.num_bytes, gap=task.gap, time_limit=task.time_limit)
    picked = [tried[number] for tried, number in zip(choices, solution.picked, strict=True)]
    return _result(task, picked, measured, solution.gap, solution.status)


def _uniforms(task: AllocationProblem) -> list[list[Choice]]:
    """One codec and one rank for all, for each pair that was measured on all; a rank is cut to the shorter side."""
    pairs = [(min(spec.shape), {*task.grid.offered(spec.shape)}) for spec in task.weights]
    common = [
        rank
        for rank in sorted(set().union(*(ranks for _, ranks in pairs)))
        if all(min(rank, limit) in ranks for limit, ranks in pairs)
    ]
    cut = [[min(rank, limit) for limit, _ in pairs] for rank in common]
    return [[Choice(codec_named(name), rank) for rank in ranks] for name in task.grid.codecs for ranks in cut]


def _scheduled(
    task: AllocationProblem, allocator: Allocator, measured: Mapping[str, CandidateErrors]
) -> list[list[Choice]]:
    """For each codec that the budget holds, the ranks of the rule."""
    most = [measured[spec.module].ranks[-1] for spec in task.weights]
    if allocator == "sara":
        ranks: Ranks = sara([(measured[spec.module].values, measured[spec.module].nuclear) for spec in task.weights])
        highest = 1.0
    else:
        ranks, highest = prilora(task.weights, most), float(max(most))
    found = []
    for name in task.grid.codecs:
        codec = codec_named(name)

        def num_bytes(tried: Sequence[int], codec=codec) -> int:
            pairs = zip(task.weights, tried, strict=True)
            return sum(task.num_bytes(spec, Choice(codec, rank)) for spec, rank in pairs)

        chosen = turned(ranks, highest, num_bytes, task.budget.num_bytes)
        if chosen is not None:
            found.append([Choice(codec, rank) for rank in chosen])
    return found


def _cheapest(
    task: AllocationProblem,
    tried: Sequence[list[Choice]],
    measured: Mapping[str, CandidateErrors],
    importances: Sequence[float],
) -> AllocationResult:
    """Of several choices for all weights the one that costs least and fits."""

    def cost(picked: Sequence[Choice]) -> float:
        triples = zip(task.weights, picked, importances, strict=True)
        return sum(factor * _square(task, measured[spec.module], choice) for spec, choice, factor in triples)

    fitting = [picked for picked in tried if _bytes(task, picked) <= task.budget.num_bytes]
    if not fitting:
        least = min((_bytes(task, picked) for picked in tried), default=None)
        needed = "" if least is None else f"; they need {task.budget.enough(least)}"
        raise BadInput(f"--budget {task.budget.text} holds no codec that is the same for all weights{needed}")
    return _result(task, min(fitting, key=cost), measured, None, f"best of {len(fitting)}")


def _result(
    task: AllocationProblem,
    picked: Sequence[Choice],
    measured: Mapping[str, CandidateErrors],
    gap: float | None,
    status: str,
) -> AllocationResult:
    choices = {spec.module: choice for spec, choice in zip(task.weights, picked, strict=True)}
    squares = {module: _square(task, measured[module], choice) for module, choice in choices.items()}
    norms = {module: measured[module].norm for module in choices}
    errors = {module: relative(squares, norms, [module]) for module in choices}
    num_bytes = _bytes(task, picked)
    assert num_bytes <= task.budget.num_bytes, "whole numbers, counted once more"
    return AllocationResult(Allocation(choices, errors), squares, norms, num_bytes, gap, status)


def _bytes(task: AllocationProblem, picked: Sequence[Choice]) -> int:
    return sum(task.num_bytes(spec, choice) for spec, choice in zip(task.weights, picked, strict=True))


def _square(task: AllocationProblem, measured: CandidateErrors, choice: Choice) -> float:
    codec = next(number for number, name in enumerate(task.grid.codecs) if codec_named(name) is choice.codec)
    return expected(measured, codec, choice.rank)


def _tried(task: AllocationProblem, allocator: Allocator, spec: WeightSpec) -> list[Choice]:
    """What an allocator may give to a weight."""
    grid, shape = task.grid, spec.shape
    if allocator == "bits":
        return grid.choices([grid.fixed(shape)])
    return grid.choices([0] if allocator in ("sara", "prilora") else grid.offered(shape))
