"""The summary of an allocation against numbers counted by hand."""

import io

from rich.console import Console

from qsvd.numerics.names import codec_named
from qsvd.plan.allocation import Allocation, Choice
from qsvd.plan.budget import parse_budget
from qsvd.plan.grid import Grid
from qsvd.plan.solve import AllocationProblem, AllocationResult
from qsvd.plan.weights import WeightSpec
from qsvd.report.allocation import allocation_tables, summary

WEIGHTS = [
    WeightSpec("a.weight", "a", (64, 64), "q", 0),
    WeightSpec("b.weight", "b", (64, 64), "q", 1),
    WeightSpec("c.weight", "c", (64, 192), "down", 0),
]
NAMES = ("nf2-64-fp16", "nf4-64-fp16")


def made(count="stored", gap=0.00012):
    task = AllocationProblem(WEIGHTS, Grid(NAMES, (0, 8), 8), parse_budget("4bits", WEIGHTS), 2, count)
    two, four = map(codec_named, NAMES)
    choices = {"a": Choice(four, 8), "b": Choice(two, 0), "c": Choice(two, 0)}
    squares, norms = {"a": 1.0, "b": 4.0, "c": 20.0}, {"a": 100.0, "b": 25.0, "c": 500.0}
    return task, AllocationResult(Allocation(choices), squares, norms, 10_000, gap, "optimal within the gap")


def shown(task, result):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(allocation_tables(task, result))
    return console.export_text()


# bytes by hand: a 2048 + 128 + 8 * 128 * 2 = 4224; b 1024 + 128 = 1152; c 3072 + 384 = 3456; all 8832 of 20,480 numbers
def test_the_lines_say_what_is_used_and_what_is_expected():
    assert summary(*made()) == [
        "budget: 4bits stored (10.2 KB), used: 10,000 of 10,240 bytes, 97.66%",
        "bits per element: 3.450 with components (8.83 KB), 2.650 without (as LQ-LoRA counts)",
        "expected error: 0.2000 of the norm of the weights",
        "solver: optimal within the gap, gap 0.00012 (asked 0.0001)",
    ]
    training = summary(*made(count="training", gap=None))
    assert training[0].startswith("budget: 4bits in memory while the components are trained (10.2 KB)")
    assert training[-1] == "solver: optimal within the gap"


def test_roles_and_choices_are_counted():
    lines = [" ".join(line.replace("│", " ").split()) for line in shown(*made()).splitlines()]
    assert "q 2 8,192 5.250 4.0 0.2000" in lines
    assert "down 1 12,288 2.250 0.0 0.2000" in lines
    assert "all 3 20,480 3.450 2.7 0.2000" in lines
    place = lines.index("nf2-64-fp16 0 2 80.0")
    assert lines[place + 1] == "nf4-64-fp16 8 1 20.0"


def test_it_fits_a_terminal_of_80_columns():
    assert max(map(len, shown(*made()).splitlines())) <= 80
