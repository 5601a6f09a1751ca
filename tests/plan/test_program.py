"""The integer program against enumeration of every choice; and its silence."""

import ctypes
import sys
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qsvd.plan import program
from qsvd.plan.program import Candidates, least_bytes, silent_stdout, solve_program

ROUNDOFF = 1e-9  # relative, of sums of a few float64


def enumerated(weights, budget):
    """The least cost within a budget, of all choices there are; None if none fits."""
    costs = [
        sum(one.costs[number] for one, number in zip(weights, picked, strict=True))
        for picked in product(*(range(len(one.costs)) for one in weights))
        if sum(one.num_bytes[number] for one, number in zip(weights, picked, strict=True)) <= budget
    ]
    return min(costs, default=None)


def check(weights, budget, found):
    """That an answer is what it says: one candidate each, within the budget."""
    assert len(found.picked) == len(weights)
    pairs = list(zip(weights, found.picked, strict=True))
    assert found.num_bytes == sum(one.num_bytes[number] for one, number in pairs) <= budget
    assert found.cost == pytest.approx(sum(one.costs[number] for one, number in pairs), rel=ROUNDOFF, abs=1e-300)


@st.composite
def instances(draw):
    """Up to 5 weights of up to 5 candidates, in odd sizes and scales of cost, and a budget anywhere."""
    size, unit = draw(st.sampled_from((1, 1_000, 10**9))), draw(st.sampled_from((1e-9, 1.0, 1e12)))
    number = st.integers(0, 50)
    weights = []
    for _ in range(draw(st.integers(1, 5))):
        rows = draw(st.lists(st.tuples(number, number), min_size=1, max_size=5))
        weights.append(Candidates([size * a + draw(st.integers(0, 3)) for a, _ in rows], [unit * b for _, b in rows]))
    low, high = least_bytes(weights), sum(max(one.num_bytes) for one in weights)
    return weights, draw(st.integers(low, high + 1))


@settings(max_examples=150, deadline=None)
@given(instances())
def test_the_answer_is_the_best_there_is(instance):
    weights, budget = instance
    found = solve_program(weights, budget, gap=0.0)
    check(weights, budget, found)
    best = enumerated(weights, budget)
    assert found.cost == pytest.approx(best, rel=1e-6, abs=0)
    assert found.cost * (1 - found.gap) <= best * (1 + 1e-6)  # the bound that a gap stands for


@settings(max_examples=40, deadline=None)
@given(instances(), st.sampled_from((0.3, 0.01)))
def test_the_gap_that_is_allowed_is_not_exceeded(instance, gap):
    weights, budget = instance
    found = solve_program(weights, budget, gap=gap)
    check(weights, budget, found)
    assert found.cost * (1 - gap) <= enumerated(weights, budget) * (1 + 1e-6)
    assert found.cost * (1 - found.gap) <= enumerated(weights, budget) * (1 + 1e-6)


def model_like(num_weights, candidates, seed=0):
    """Weights of up to 200 MB whose costs fall with their bytes."""
    rng = np.random.default_rng(seed)
    weights = []
    for _ in range(num_weights):
        num_bytes = np.sort(rng.integers(10**7, 2 * 10**8, candidates))
        costs = rng.lognormal() * 1e3 * 4.0 ** -(num_bytes / 2e7) * rng.uniform(0.9, 1.1, candidates)
        weights.append(Candidates(num_bytes.tolist(), costs.tolist()))
    return weights


@pytest.mark.parametrize("share", [0.0, 1e-9, 0.1, 0.5, 0.9, 1.0])
def test_a_large_program_stays_within_the_budget_and_its_bound(share):
    weights = model_like(60, 30)
    low, high = least_bytes(weights), sum(max(one.num_bytes) for one in weights)
    budget = low + int(share * (high - low))
    found = solve_program(weights, budget, gap=1e-4, time_limit=20)
    check(weights, budget, found)
    assert found.gap <= 2e-4
    assert found.status in ("optimal", "optimal within the gap")


def test_more_budget_never_costs_more():
    weights = model_like(20, 12)
    low, high = least_bytes(weights), sum(max(one.num_bytes) for one in weights)
    costs = [solve_program(weights, low + (high - low) * step // 12, gap=0.0).cost for step in range(13)]
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in pairwise(costs))


def test_an_answer_of_the_solver_that_is_over_budget_is_solved_again_for_less(monkeypatch):
    weights = [Candidates([0, 100], [10.0, 1.0]), Candidates([0, 90], [8.0, 1.0]), Candidates([0, 50], [3.0, 1.0])]
    asked = []

    def sloppy(reduced, allowed, unit, limits):
        asked.append(allowed)
        tried, above, status = highs(reduced, allowed + 20, unit, limits)  # as if its tolerance were 20 bytes
        return tried, above, status

    highs = program._highs
    monkeypatch.setattr(program, "_highs", sloppy)
    found = solve_program(weights, 140, gap=0.0)
    check(weights, 140, found)
    assert asked[0] == 140
    assert len(asked) > 1
    assert asked[1] < 140


def test_the_gap_is_to_the_bound_that_the_solver_gave_for_the_whole_budget(monkeypatch):
    weights = [Candidates([0, 100], [10.0, 1.0]), Candidates([0, 90], [8.0, 2.0]), Candidates([0, 50], [3.0, 1.0])]
    floor = 1.0 + 2.0 + 1.0
    answers = [((1, 1, 1), 2.5, "optimal"), ((0, 1, 1), 9.5, "optimal")]  # too large; then of a tightened budget
    monkeypatch.setattr(program, "_highs", lambda *_: answers.pop(0))
    found = solve_program(weights, 140, gap=0.0)
    assert found.picked in ((0, 1, 1), (1, 0, 0))
    assert found.gap == pytest.approx((found.cost - floor - 2.5) / found.cost)


def test_a_solver_without_an_answer_leaves_the_answer_by_steps(monkeypatch):
    weights = model_like(10, 8)
    budget = 2 * least_bytes(weights)
    monkeypatch.setattr(program, "_highs", lambda *_: (None, 0.0, "time limit"))
    found = solve_program(weights, budget, gap=0.0)
    check(weights, budget, found)
    monkeypatch.undo()
    best = solve_program(weights, budget, gap=0.0)
    assert found.status == "time limit"
    assert best.cost <= found.cost
    assert found.cost * (1 - found.gap) <= best.cost  # only what each weight costs at least is known


def test_a_budget_below_the_smallest_candidates_is_refused():
    weights = [Candidates([7, 5], [1.0, 2.0]), Candidates([6], [1.0])]
    assert solve_program(weights, 11).picked == (1, 0)
    with pytest.raises(ValueError, match="a budget of 10 bytes is below the 11 bytes of the smallest candidates"):
        solve_program(weights, 10)


def test_costs_that_are_all_zero():
    found = solve_program([Candidates([3, 4], [0.0, 0.0])] * 3, 10)
    assert found.cost == found.gap == 0
    assert found.num_bytes == 9


def test_c_is_silent_inside_and_loud_outside(capfd):
    library = ctypes.CDLL(None)
    sys.stdout.write("before\n")
    with silent_stdout():
        library.puts(b"noise that C may hold back until the process ends")
        sys.stderr.write("to stderr\n")
    library.puts(b"after")
    library.fflush(None)
    shown = capfd.readouterr()
    assert shown.out == "before\nafter\n"
    assert shown.err == "to stderr\n"
