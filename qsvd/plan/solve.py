"""Choose the codec and the rank of every weight, from the measured errors of its candidates and one budget for all.

both      bits and ranks, by the integer program of LQ-LoRA (arXiv:2311.12023) with ranks as a second dimension
bits      bits, as in LQ-LoRA: every weight has the same rank
uniform   one codec and one rank for all weights: the pair with the least cost
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
from qsvd.plan.grid import CountedAs, Grid, counted_bytes
from qsvd.plan.program import Candidates, solve_program
from qsvd.plan.weights import WeightSpec

HALVINGS = 60  # of an interval of settings: more than a double can tell apart
LAST_TO_FIRST = 3  # rank of the last layer over that of the first: 12 over 4, as in PRILoRA

Allocator = Literal["both", "bits", "uniform", "sara", "prilora"]
Errors = Mapping[str, CandidateErrors]  # by module
Ranks = Callable[[float], list[int]]  # a setting -> the rank of every weight; a higher setting lowers no rank


@dataclass(frozen=True)
class AllocationProblem:
    """The weights, their candidates and the budget.

    Args:
        weights: In model order.
        grid: The candidates of each weight.
        budget: For all weights together.
        factor_bytes: Bytes of a stored number of the factors.
        count: What counts against the budget.
        gap, time_limit: Limits of the integer program: relative gap, and seconds.
    """

    weights: Sequence[WeightSpec]
    grid: Grid
    budget: Budget
    factor_bytes: int
    count: CountedAs = "stored"
    gap: float = 1e-4
    time_limit: float = 60.0

    def num_bytes(self, spec: WeightSpec, choice: Choice) -> int:
        """Return the bytes of one weight that count against the budget."""
        return counted_bytes(choice, spec.shape, self.factor_bytes, self.count)

    def total_bytes(self, choices: Sequence[Choice]) -> int:
        """Return the bytes of all weights that count against the budget."""
        return sum(self.num_bytes(spec, choice) for spec, choice in zip(self.weights, choices, strict=True))

    def square(self, choice: Choice, errors: CandidateErrors) -> float:
        """Return the expected squared error of one weight."""
        codecs = [codec_named(name) for name in self.grid.codecs]
        return expected(errors, codecs.index(choice.codec), choice.rank)


@dataclass(frozen=True)
class AllocationResult:
    """An allocation and its expected errors.

    Args:
        allocation: With the expected relative errors.
        squares: Expected squared error of each weight, not multiplied by its importance.
        norms: Squared norm of each weight, in the norm of the errors.
        num_bytes: Bytes that count against the budget.
        gap: Relative gap of the integer program; None for other allocators.
        status: How the search ended, for people.
    """

    allocation: Allocation
    squares: Mapping[str, float]
    norms: Mapping[str, float]
    num_bytes: int
    gap: float | None
    status: str


def solve(
    problem: AllocationProblem, allocator: Allocator, errors: Errors, importances: Mapping[str, float] | None = None
) -> AllocationResult:
    """Return the choices with the least cost that the allocator finds: the sum of importance times squared error.

    Args:
        errors: Measured for the codecs and the ranks of the grid.
        importances: By module, above 0; None is 1 for all.

    Raises:
        BadInput: the budget is too small.
    """
    check_feasible(problem, allocator)
    factors = [1.0 if importances is None else importances[spec.module] for spec in problem.weights]
    if allocator in ("both", "bits"):
        return _by_program(problem, allocator, errors, factors)
    tried = _uniform(problem) if allocator == "uniform" else _by_rule(problem, allocator, errors)
    return _cheapest(problem, tried, errors, factors)


def check_feasible(problem: AllocationProblem, allocator: Allocator) -> None:
    """Refuse a budget that no choice meets, before anything is measured.

    Raises:
        BadInput: with the least budget that is enough, in the same unit.
    """
    smallest = sum(
        min(problem.num_bytes(spec, choice) for choice in _candidates(problem, allocator, spec))
        for spec in problem.weights
    )
    what, other = "with their smallest codecs and ranks", "smaller --codecs or --ranks"
    if allocator == "bits":
        what, other = f"with their smallest codecs and rank {problem.grid.rank}", "a lower --rank, or --allocator both"
    budget = problem.budget
    if smallest > budget.num_bytes:
        advice = f"give at least that, or {other}" if smallest <= budget.most_bytes else f"give {other}"
        raise BadInput(
            f"--budget {budget.text} is too small: {what}, the {len(problem.weights)} weights need "
            f"{budget.enough(smallest)}; {advice}"
        )


def over_norms(weights: Sequence[WeightSpec], errors: Errors) -> dict[str, float]:
    """Return importances for relative errors: in two weights of one size, a tenth of either norm counts the same."""
    norms = {spec.module: errors[spec.module].norm / prod(spec.shape) for spec in weights}
    return {module: 1 / norm if norm > 0 else 1.0 for module, norm in norms.items()}


def expected(errors: CandidateErrors, codec: int, rank: int) -> float:
    """Return the squared error at the codec of a number and any rank up to the highest measured one.

    Between two measured ranks its logarithm is interpolated linearly.
    """
    if rank in errors.ranks:
        return errors.squares[errors.ranks.index(rank)][codec]
    above = next(place for place, other in enumerate(errors.ranks) if other > rank)
    low, high = (errors.squares[place][codec] for place in (above - 1, above))
    start, stop = errors.ranks[above - 1 : above + 1]
    part = (rank - start) / (stop - start)
    if min(low, high) <= 0:
        return low + part * (high - low)
    return exp(log(low) + part * (log(high) - log(low)))


def relative(squares: Mapping[str, float], norms: Mapping[str, float], modules: Iterable[str]) -> float:
    """Return the norm of the errors of some weights over the norm of these weights; 0 if all of them are zero."""
    modules = list(modules)
    norm = sum(norms[module] for module in modules)
    return sqrt(sum(squares[module] for module in modules) / norm) if norm > 0 else 0.0


def _candidates(problem: AllocationProblem, allocator: Allocator, spec: WeightSpec) -> list[Choice]:
    """Return the choices that an allocator may make for a weight; rules for ranks can go down to 0."""
    grid, shape = problem.grid, spec.shape
    if allocator == "bits":
        return grid.choices([grid.fixed(shape)])
    return grid.choices([0] if allocator in ("sara", "prilora") else grid.offered(shape))


def _by_program(
    problem: AllocationProblem, allocator: Allocator, errors: Errors, importances: Sequence[float]
) -> AllocationResult:
    """Return the choices of the integer program, in which the experts of a stack have one choice."""
    groups: dict[str, list[tuple[WeightSpec, float]]] = {}
    for spec, importance in zip(problem.weights, importances, strict=True):
        groups.setdefault(spec.group, []).append((spec, importance))
    rows, tried = [], {}
    for group, members in groups.items():
        tried[group] = _candidates(problem, allocator, members[0][0])
        costs = [
            sum(importance * problem.square(choice, errors[spec.module]) for spec, importance in members)
            for choice in tried[group]
        ]
        sizes = [len(members) * problem.num_bytes(members[0][0], choice) for choice in tried[group]]
        rows.append(Candidates(sizes, costs))
    solution = solve_program(rows, problem.budget.num_bytes, gap=problem.gap, time_limit=problem.time_limit)
    picked = {group: tried[group][number] for group, number in zip(groups, solution.picked, strict=True)}
    return _result(problem, [picked[spec.group] for spec in problem.weights], errors, solution.gap, solution.status)


def _uniform(problem: AllocationProblem) -> list[list[Choice]]:
    """Return every pair of a codec and a rank that was measured on all weights, cut to the shorter side of each."""
    grid = problem.grid
    pairs = [(min(spec.shape), {*grid.offered(spec.shape)}) for spec in problem.weights]
    common = [
        rank
        for rank in sorted(set().union(*(ranks for _, ranks in pairs)))
        if all(min(rank, limit) in ranks for limit, ranks in pairs)
    ]
    cut = [[min(rank, limit) for limit, _ in pairs] for rank in common]
    tried = [(name, ranks) for ranks in cut for name in grid.codecs_for(max(ranks))]
    return [[Choice(codec_named(name), rank) for rank in ranks] for name, ranks in tried]


def _by_rule(problem: AllocationProblem, allocator: Allocator, errors: Errors) -> list[list[Choice]]:
    """Return, for each codec that the budget can hold, the highest ranks of the rule within the budget."""
    measured = [errors[spec.module] for spec in problem.weights]
    limits = [one.ranks[-1] for one in measured]
    if allocator == "sara":
        ranks, most = sara([(one.values, one.nuclear) for one in measured]), 1.0
    else:
        ranks, most = prilora(problem.weights, limits), float(max(limits))
    found = []
    for name in problem.grid.codecs_for(max(limits)):

        def choices(setting: float, name=name) -> list[Choice]:
            return [Choice(codec_named(name), rank) for rank in ranks(setting)]

        setting = highest_setting(
            most, lambda setting, choices=choices: problem.total_bytes(choices(setting)), problem.budget.num_bytes
        )
        if setting is not None:
            found.append(choices(setting))
    return found


def sara(spectra: Sequence[tuple[Sequence[float], float]]) -> Ranks:
    """Return SARA's ranks: the fewest singular values that reach a share, 0..1, of the sum of all.

    Args:
        spectra: For every weight, its leading singular values, as many as its rank may be, and the sum of all.
    """
    sums = [(list(accumulate(values)), total) for values, total in spectra]
    return lambda share: [bisect_left(reached, share * total) for reached, total in sums]


def prilora(weights: Sequence[WeightSpec], most: Sequence[int]) -> Ranks:
    """Return PRILoRA's ranks: a line over the depth, which starts at a real rank of the first layer.

    Args:
        most: The highest rank of every weight, to which the line is cut.
    """
    first, last = min(spec.layer for spec in weights), max(spec.layer for spec in weights)
    depths = [(spec.layer - first) / max(last - first, 1) for spec in weights]
    slope = LAST_TO_FIRST - 1
    return lambda start: [
        min(round(start + slope * start * depth), limit) for depth, limit in zip(depths, most, strict=True)
    ]


def highest_setting(most: float, num_bytes: Callable[[float], int], budget: int) -> float | None:
    """Return the highest setting in 0..most whose bytes the budget holds; None if it does not even hold those of 0.

    Args:
        num_bytes: Bytes at a setting; a higher setting takes at least as many.
        budget: Bytes.
    """
    low, high = 0.0, most
    if num_bytes(low) > budget:
        return None
    if num_bytes(high) <= budget:
        return high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if num_bytes(middle) <= budget:
            low = middle
        else:
            high = middle
    return low


def _cheapest(
    problem: AllocationProblem, tried: Sequence[list[Choice]], errors: Errors, importances: Sequence[float]
) -> AllocationResult:
    """Return the choices for all weights that cost least, of those that fit."""

    def cost(choices: Sequence[Choice]) -> float:
        triples = zip(problem.weights, choices, importances, strict=True)
        return sum(factor * problem.square(choice, errors[spec.module]) for spec, choice, factor in triples)

    fitting = [choices for choices in tried if problem.total_bytes(choices) <= problem.budget.num_bytes]
    if not fitting:
        least = min(map(problem.total_bytes, tried), default=None)
        needed = "" if least is None else f"; they need {problem.budget.enough(least)}"
        raise BadInput(f"--budget {problem.budget.text} is too small for one codec for all weights{needed}")
    return _result(problem, min(fitting, key=cost), errors, None, f"best of {len(fitting)}")


def _result(
    problem: AllocationProblem, choices: Sequence[Choice], errors: Errors, gap: float | None, status: str
) -> AllocationResult:
    by_module = {spec.module: choice for spec, choice in zip(problem.weights, choices, strict=True)}
    squares = {module: problem.square(choice, errors[module]) for module, choice in by_module.items()}
    norms = {module: errors[module].norm for module in by_module}
    shares = {module: relative(squares, norms, [module]) for module in by_module}
    num_bytes = problem.total_bytes(choices)
    assert num_bytes <= problem.budget.num_bytes, "bytes are counted again in whole numbers"
    return AllocationResult(Allocation(by_module, shares), squares, norms, num_bytes, gap, status)
