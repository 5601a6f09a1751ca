"""An allocation for people: by role, by choice, and what it takes of the budget."""

from collections import Counter
from collections.abc import Sequence
from math import prod

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qsvd.errors import show_size
from qsvd.numerics.names import spelling
from qsvd.plan.allocation import residual_bits, stored_bytes
from qsvd.plan.solve import AllocationProblem, AllocationResult, relative
from qsvd.plan.weights import WeightSpec
from qsvd.report.errors import number, short_count


def allocation_tables(task: AllocationProblem, result: AllocationResult) -> Group:
    """Two tables and a few lines, for a terminal of 80 columns."""
    lines = [Text(line) for line in summary(task, result)]
    parts: list[RenderableType] = [_roles(task, result), Text(""), _choices(task, result), Text(""), *lines]
    return Group(*parts)


def summary(task: AllocationProblem, result: AllocationResult) -> list[str]:
    """What the whole takes and costs, a line each; the same lines stand in the file as remarks."""
    budget, modules = task.budget, [spec.module for spec in task.weights]
    used = f"{result.num_bytes:,} of {budget.num_bytes:,} bytes, {result.num_bytes / budget.num_bytes:.2%}"
    counted = {"stored": "stored", "training": "in memory while the factors train"}[task.count]
    stored = stored_bytes(result.allocation, task.weights, task.factor_bytes)
    bits = 8 * stored / budget.num_elements
    solver = result.status if result.gap is None else f"{result.status}, gap {result.gap:.2g} (asked {task.gap:.2g})"
    return [
        f"budget: {budget.text} {counted} ({show_size(budget.num_bytes)}), used: {used}",
        f"bits a number: {bits:.3f} stored with factors ({show_size(stored)}), "
        f"{residual_bits(result.allocation, task.weights):.3f} without, as LQ-LoRA counts",
        f"expected error: {number(relative(result.squares, result.norms, modules))} of the norm of the weights",
        f"solver: {solver}",
    ]


def _roles(task: AllocationProblem, result: AllocationResult) -> Table:
    table = _table("By role", ["role"], ["weights", "numbers", "bits", "mean rank", "expected error"])
    roles = list(dict.fromkeys(spec.role for spec in task.weights))
    for role in roles:
        table.add_row(role, *_cells(task, result, [spec for spec in task.weights if spec.role == role]))
    table.add_row("all", *_cells(task, result, task.weights), style="bold")
    return table


def _cells(task: AllocationProblem, result: AllocationResult, weights: Sequence[WeightSpec]) -> list[str]:
    choices = result.allocation.choices
    elements = sum(prod(spec.shape) for spec in weights)
    bits = 8 * stored_bytes(result.allocation, weights, task.factor_bytes) / elements
    rank = sum(choices[spec.module].rank for spec in weights) / len(weights)
    error = relative(result.squares, result.norms, [spec.module for spec in weights])
    return [f"{len(weights):,}", short_count(elements), f"{bits:.3f}", f"{rank:.1f}", number(error)]


def _choices(task: AllocationProblem, result: AllocationResult) -> Table:
    """How many weights, and which share of the numbers, each codec and rank got; most numbers first."""
    table = _table("By choice", ["codec"], ["rank", "weights", "share"])
    counts: Counter[tuple[str, int]] = Counter()
    elements: Counter[tuple[str, int]] = Counter()
    for spec in task.weights:
        choice = result.allocation.choices[spec.module]
        key = (spelling(choice.codec), choice.rank)
        counts[key] += 1
        elements[key] += prod(spec.shape)
    for (codec, rank), held in sorted(elements.items(), key=lambda item: (-item[1], item[0])):
        table.add_row(codec, str(rank), f"{counts[codec, rank]:,}", f"{held / task.budget.num_elements:.1%}")
    return table


def _table(title: str, words: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for head in words:
        table.add_column(head, overflow="fold")
    for head in numbers:
        table.add_column(head, justify="right", overflow="fold")
    return table
