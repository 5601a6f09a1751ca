"""An allocation as tables: by layer type, by choice, and its share of the budget."""

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
from qsvd.report.errors import number, short_count, terminal_table


def allocation_tables(task: AllocationProblem, result: AllocationResult) -> Group:
    """Return two tables and the summary, for a terminal of 80 columns."""
    lines = [Text(line) for line in summary(task, result)]
    parts: list[RenderableType] = [_types(task, result), Text(""), _choices(task, result), Text(""), *lines]
    return Group(*parts)


def summary(task: AllocationProblem, result: AllocationResult) -> list[str]:
    """Return lines on budget, bits, error and solver; the allocation file has them as comments."""
    budget, modules = task.budget, [spec.module for spec in task.weights]
    used = f"{result.num_bytes:,} of {budget.num_bytes:,} bytes, {result.num_bytes / budget.num_bytes:.2%}"
    counted = {"stored": "stored", "training": "in memory while the components are trained"}[task.count]
    stored = stored_bytes(result.allocation, task.weights, task.factor_bytes)
    bits = 8 * stored / budget.num_elements
    solver = result.status if result.gap is None else f"{result.status}, gap {result.gap:.2g} (asked {task.gap:.2g})"
    return [
        f"budget: {budget.text} {counted} ({show_size(budget.num_bytes)}), used: {used}",
        f"bits per element: {bits:.3f} with components ({show_size(stored)}), "
        f"{residual_bits(result.allocation, task.weights):.3f} without (as LQ-LoRA counts)",
        f"expected error: {number(relative(result.squares, result.norms, modules))} of the norm of the weights",
        f"solver: {solver}",
    ]


def _types(task: AllocationProblem, result: AllocationResult) -> Table:
    heads = ["layers", "elements", "bits per\nelement", "mean rank", "expected\nrelative error"]
    table = terminal_table("Allocation by layer type", ["layer type"], heads)
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
    """Return the number of layers and the share of the elements with each codec and rank, largest share first."""
    table = terminal_table("Allocation by codec and rank", ["codec"], ["rank", "layers", "elements (%)"])
    counts: Counter[tuple[str, int]] = Counter()
    elements: Counter[tuple[str, int]] = Counter()
    for spec in task.weights:
        choice = result.allocation.choices[spec.module]
        key = (spelling(choice.codec), choice.rank)
        counts[key] += 1
        elements[key] += prod(spec.shape)
    for (codec, rank), held in sorted(elements.items(), key=lambda item: (-item[1], item[0])):
        table.add_row(codec, str(rank), f"{counts[codec, rank]:,}", f"{100 * held / task.budget.num_elements:.1f}")
    return table
