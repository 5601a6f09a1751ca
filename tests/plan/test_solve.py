"""The allocators on made-up measurements, against their definitions and against enumeration; rules for ranks."""

import math
from dataclasses import replace
from itertools import product
from typing import get_args

import numpy as np
import pytest

from qsvd.decompose.candidates import CandidateErrors
from qsvd.numerics.names import codec_named
from qsvd.plan.allocation import Choice
from qsvd.plan.budget import parse_budget
from qsvd.plan.grid import Grid
from qsvd.plan.solve import (
    AllocationProblem,
    Allocator,
    check_feasible,
    expected,
    highest_setting,
    over_norms,
    prilora,
    sara,
    solve,
)
from tests import reference
from tests.plan.weights import specs

CODECS = ("nf2-16-2x64", "nf3-16-3x64", "nf4-16-4x64", "nf8-128-8x256")
WEIGHTS = specs(layers=2)
ROUNDOFF = 1e-9


def task(budget, *, weights=WEIGHTS, codecs=CODECS, ranks=(0, 2, 4, 8), rank=2, **changes):
    grid = Grid(codecs, ranks, rank)
    return AllocationProblem(weights, grid, parse_budget(budget, weights), factor_bytes=2, gap=0.0, **changes)


def measurements(job, seed=0):
    """Errors that fall with bits and with rank, differently for each weight."""
    rng = np.random.default_rng(seed)
    made = {}
    for spec in job.weights:
        ranks = job.grid.measured(spec.shape, with_fixed=True)
        size, fall = rng.lognormal(sigma=1.5), rng.uniform(0.05, 0.4)
        squares = tuple(
            tuple(size * 4.0 ** -codec_named(name).bits * math.exp(-fall * rank) for name in job.grid.codecs)
            for rank in ranks
        )
        values = tuple((np.arange(1, ranks[-1] + 1.0) ** -rng.uniform(0.3, 1.5)).tolist())
        made[spec.module] = CandidateErrors(ranks, squares, size, values, 2 * sum(values))
    return made


def cost(job, measured, choices, importances=None):
    """Of choices at measured ranks, looked up."""
    total = 0.0
    for spec in job.weights:
        choice, one = choices[spec.module], measured[spec.module]
        codec = [codec_named(name) for name in job.grid.codecs].index(choice.codec)
        square = one.squares[one.ranks.index(choice.rank)][codec]
        total += square * (importances[spec.module] if importances else 1.0)
    return total


def taken(job, choices):
    return sum(job.num_bytes(spec, choices[spec.module]) for spec in job.weights)


def every_choice(job, ranks_of):
    """All allocations within the budget."""
    tried = [[Choice(codec_named(name), rank) for name in job.grid.codecs for rank in ranks_of(s)] for s in job.weights]
    for picked in product(*tried):
        choices = {spec.module: choice for spec, choice in zip(job.weights, picked, strict=True)}
        if taken(job, choices) <= job.budget.num_bytes:
            yield choices


SMALL = {"weights": WEIGHTS[:3], "codecs": CODECS[:3], "ranks": (0, 2, 8)}


@pytest.mark.parametrize("budget", ["2.2bits", "2.9bits", "3.5bits", "4.4bits"])
@pytest.mark.parametrize("count", ["stored", "training"])
def test_both_is_the_best_of_all_codecs_and_ranks(budget, count):
    job = task(budget, count=count, **SMALL)
    measured = measurements(job)
    found = solve(job, "both", measured)
    best = min(cost(job, measured, choices) for choices in every_choice(job, lambda _: (0, 2, 8)))
    assert cost(job, measured, found.allocation.choices) == pytest.approx(best, rel=ROUNDOFF)
    assert found.num_bytes == taken(job, found.allocation.choices) <= job.budget.num_bytes
    assert found.gap == 0


@pytest.mark.parametrize("budget", ["5.9bits", "6.6bits", "7.6bits"])
def test_bits_is_the_best_at_one_rank(budget):
    job = task(budget, rank=4, **SMALL)
    measured = measurements(job)
    found = solve(job, "bits", measured).allocation.choices
    best = min(cost(job, measured, choices) for choices in every_choice(job, lambda _: (4,)))
    assert {choice.rank for choice in found.values()} == {4}
    assert len({choice.codec for choice in found.values()}) > 1
    assert cost(job, measured, found) == pytest.approx(best, rel=ROUNDOFF)


def test_bits_cuts_a_rank_to_the_shorter_side():
    weights = [replace(WEIGHTS[0], shape=(256, 512)), replace(WEIGHTS[1], shape=(8, 512))]
    job = task("16bits", weights=weights, rank=12)
    found = solve(job, "bits", measurements(job)).allocation.choices
    assert [choice.rank for choice in found.values()] == [12, 8]


@pytest.mark.parametrize("budget", ["2.3bits", "3bits", "3.7bits", "5bits"])
def test_uniform_is_the_best_pair_for_all(budget):
    job = task(budget, ranks=(0, 4, 24))
    measured = measurements(job)
    pairs = []
    for name, rank in product(CODECS, (0, 4, 24)):
        choices = {spec.module: Choice(codec_named(name), min(rank, min(spec.shape))) for spec in WEIGHTS}
        if taken(job, choices) <= job.budget.num_bytes:
            pairs.append((cost(job, measured, choices), choices))
    found = solve(job, "uniform", measured)
    assert found.allocation.choices == min(pairs, key=lambda pair: pair[0])[1]
    assert found.gap is None


@pytest.mark.parametrize("allocator", ["both", "uniform", "sara", "prilora"])
def test_the_control_has_no_components_however_small_its_errors_are(allocator):
    job = task("12bits")
    job = replace(job, grid=replace(job.grid, control=CODECS[2]))
    measured = measurements(job)
    best = {}
    for module, one in measured.items():
        rows = zip(one.ranks, one.squares, strict=True)
        best[module] = replace(one, squares=tuple((*row[:2], 0.0 if rank else 1e9, row[3]) for rank, row in rows))
    choices = solve(job, allocator, best).allocation.choices.values()
    assert not any(choice.rank for choice in choices if choice.codec.name == CODECS[2])


def test_uniform_takes_only_ranks_that_all_weights_have_measured():
    weights = [*WEIGHTS[:1], replace(WEIGHTS[1], shape=(512, 512))]  # ladders 0..4 and 1..64
    job = task("5bits", weights=weights, ranks=None)
    measured = measurements(job)
    assert set(job.grid.offered((32, 32))) == {0, 1, 2, 4}
    assert set(job.grid.offered((512, 512))) == {0, 1, 2, 4, 8, 16, 32, 64}
    ranks = [choice.rank for choice in solve(job, "uniform", measured).allocation.choices.values()]
    assert len({*ranks}) == 1
    assert ranks[0] <= 4


@pytest.mark.parametrize("budget", ["2.4bits", "3.5bits", "4.7bits"])
def test_sara_gives_every_weight_the_same_share_of_its_singular_values(budget):
    job = task(budget, codecs=CODECS[:1], ranks=None, weights=[replace(s, shape=(256, 512)) for s in WEIGHTS])
    measured = measurements(job)
    found = solve(job, "sara", measured)
    low, high = 0.0, 1.0  # shares that the ranks are compatible with
    for module, choice in found.allocation.choices.items():
        sums = np.cumsum((0.0, *measured[module].values)) / measured[module].nuclear
        low = max(low, sums[choice.rank])
        high = min(high, sums[choice.rank + 1] if choice.rank + 1 < len(sums) else 1.0)
    assert low <= high
    assert found.num_bytes <= job.budget.num_bytes
    finest = 2 * (256 + 512)  # one more component of one weight
    full = all(choice.rank == measured[module].ranks[-1] for module, choice in found.allocation.choices.items())
    assert full or job.budget.num_bytes - found.num_bytes < finest


def test_prilora_is_a_line_in_depth_that_meets_the_budget():
    weights = [replace(spec, shape=(256, 512)) for spec in specs(layers=5)]
    job = task("3bits", codecs=CODECS[:1], ranks=None, weights=weights)
    found = solve(job, "prilora", measurements(job))
    ranks = [found.allocation.choices[spec.module].rank for spec in weights]
    by_layer = ranks[::3]
    assert ranks == [rank for rank in by_layer for _ in range(3)]
    assert np.abs(np.diff(by_layer) - np.diff(by_layer).mean()).max() <= 1  # a line, rounded
    assert by_layer[-1] == pytest.approx(3 * by_layer[0], abs=2)
    assert found.num_bytes <= job.budget.num_bytes
    assert job.budget.num_bytes - found.num_bytes < 2 * (256 + 512) * len(weights)


@pytest.mark.parametrize("allocator", ["sara", "prilora"])
def test_of_several_codecs_the_one_is_kept_that_costs_least(allocator):
    weights = [replace(spec, shape=(256, 512)) for spec in WEIGHTS]
    measured = measurements(task("16bits", ranks=None, weights=weights))
    alone = []
    for number, name in enumerate(CODECS[:3]):
        job = task("4.6bits", codecs=(name,), ranks=None, weights=weights)
        only = {m: replace(o, squares=tuple((row[number],) for row in o.squares)) for m, o in measured.items()}
        found = solve(job, allocator, only)
        alone.append((sum(found.squares.values()), found.allocation.choices))
    job = task("4.6bits", ranks=None, weights=weights)
    assert solve(job, allocator, measured).allocation.choices == min(alone, key=lambda pair: pair[0])[1]


@pytest.mark.parametrize("allocator", get_args(Allocator))
def test_importance_moves_the_budget_to_what_matters(allocator):
    job = task("3.4bits", rank=0)
    measured = measurements(job)
    important = {spec.module: 1000.0 if spec.layer == 1 else 1e-3 for spec in WEIGHTS}
    plain, moved = (solve(job, allocator, measured, factors) for factors in (None, important))
    if allocator in ("both", "bits"):
        before, after = (cost(job, measured, one.allocation.choices, important) for one in (plain, moved))
        assert after < before
        assert sum(moved.squares.values()) > sum(plain.squares.values())
    squares = {m: measured[m].norm * e**2 for m, e in moved.allocation.errors.items()}
    assert squares == pytest.approx(moved.squares)  # what is expected of a weight is its own error, not its importance


def test_between_measured_ranks_the_logarithm_of_the_error_is_a_line():
    measured = CandidateErrors((0, 4, 8), ((8.0, 5.0), (2.0, 1.0), (0.5, 0.0)), 1.0, (), 0.0)
    assert [expected(measured, 0, rank) for rank in (0, 1, 2, 4, 8)] == pytest.approx([8, 8 / 2**0.5, 4, 2, 0.5])
    assert expected(measured, 1, 6) == pytest.approx(0.5)  # to nothing, in a straight line


@pytest.mark.parametrize(("allocator", "rank"), [("both", 2), ("uniform", 2), ("sara", 2), ("prilora", 2), ("bits", 8)])
def test_a_budget_that_is_too_small_is_refused_with_the_least_one(allocator, rank):
    weights = [replace(spec, shape=(32, 32)) for spec in WEIGHTS]
    small = task("1bits", weights=weights, rank=rank)
    hint = f"rank {rank}" if allocator == "bits" else "with their smallest codecs and ranks"
    with pytest.raises(
        ValueError, match=rf"--budget 1bits is too small: .*{hint}, the 6 weights need [\d.]+bits"
    ) as no:
        check_feasible(small, allocator)
    with pytest.raises(ValueError, match="is too small"):
        solve(small, allocator, {})
    named = next(word for word in str(no.value).replace(";", "").split() if word.endswith("bits") and word != "1bits")
    enough = task(named, weights=weights, rank=rank)
    found = solve(enough, allocator, measurements(enough))
    assert found.num_bytes <= enough.budget.num_bytes
    below = f"{float(named.removesuffix('bits')) - 0.002:.3f}bits"
    with pytest.raises(ValueError, match="is too small"):
        check_feasible(task(below, weights=weights, rank=rank), allocator)


def test_a_weight_of_zeros_has_no_error():
    job = task("3bits")
    measured = measurements(job)
    module = WEIGHTS[0].module
    measured[module] = replace(measured[module], norm=0.0, squares=tuple((0.0,) * 4 for _ in measured[module].ranks))
    found = solve(job, "both", measured)
    assert found.allocation.errors[module] == 0
    assert found.allocation.choices[module] == Choice(codec_named(CODECS[0]), 0)


def test_a_rank_that_needs_more_than_16_bits_is_not_advised():
    with pytest.raises(ValueError, match=r"the 6 weights need [\d.]+bits; give a lower --rank, or --allocator both$"):
        check_feasible(task("16bits", rank=24), "bits")


def test_relative_errors_do_not_ask_in_which_unit_a_weight_is_written():
    job = task("3.4bits")
    measured = measurements(job)
    first = WEIGHTS[0].module
    one = measured[first]
    louder = measured | {
        first: replace(one, norm=1e4 * one.norm, squares=tuple(tuple(1e4 * s for s in row) for row in one.squares))
    }
    plain, relative = (
        [dict(solve(job, "both", m, weigh(m)).allocation.choices) for m in (measured, louder)]
        for weigh in (lambda _: None, lambda m: over_norms(WEIGHTS, m))
    )
    assert relative[0] == relative[1]
    assert plain[0] != plain[1]
    wanted = {spec.module: math.prod(spec.shape) / measured[spec.module].norm for spec in WEIGHTS}
    assert over_norms(WEIGHTS, measured) == pytest.approx(wanted)


def test_a_weight_of_zeros_counts_as_it_is():
    measured = measurements(task("3.4bits"))
    first = WEIGHTS[0].module
    assert over_norms(WEIGHTS[:1], {first: replace(measured[first], norm=0.0)}) == {first: 1.0}


def test_sara_counts_leading_singular_values_whose_sum_stays_below_a_share_of_all():
    matrices = [reference.decaying(40, 60, power=power) for power in (0.2, 0.7, 2.0)]
    spectra = [reference.singular_values(matrix) for matrix in matrices]
    ranks = sara([(values.tolist(), float(values.sum())) for values in spectra])
    for share in (0.0, 0.01, 0.1, 0.3, 0.77):
        by_hand = [int((np.cumsum(values) < share * values.sum()).sum()) for values in spectra]
        assert ranks(share) == by_hand
    assert ranks(0.0) == [0, 0, 0]
    assert len(set(ranks(0.5))) == 3


def test_sara_gives_no_more_ranks_than_there_are_values():
    assert sara([([5.0, 4.0], 100.0)])(0.9) == [2]


def test_prilora_rises_in_a_line_from_a_rank_to_three_times_that():
    weights = specs(layers=5)
    ranks = prilora(weights, [100] * len(weights))
    by_layer = [round(4 + (12 - 4) * layer / 4) for layer in range(5)]
    assert ranks(4.0) == [rank for rank in by_layer for _ in range(3)]
    assert prilora(weights, [7] * len(weights))(4.0)[-1] == 7


def test_prilora_of_one_layer():
    assert prilora(specs(layers=1), [100] * 3)(4.0) == [4, 4, 4]


@pytest.mark.parametrize("budget", [0, 1, 17, 3_001, 5_999, 6_000, 10_000])
def test_the_next_rank_above_the_highest_setting_is_too_much(budget):
    settings = np.sort(np.random.default_rng(0).uniform(0, 1, 3_000))  # at each of which one more rank comes

    def rank(setting):
        return int((settings <= setting).sum())

    found = highest_setting(1.0, lambda setting: 2 * rank(setting), budget)
    assert rank(found) == min(budget // 2, 3_000)


def test_nothing_is_found_if_the_least_is_too_much():
    assert highest_setting(1.0, lambda _: 5, 4) is None
