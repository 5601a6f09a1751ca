"""The report for a terminal of 80 columns or more, as something that rich prints."""

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qsvd.decompose.measure import WeightError
from qsvd.numerics.error import Norms
from qsvd.report.cells import estimate, number, short_count
from qsvd.report.header import Header, left_line
from qsvd.report.totals import Total, reduction, relative, totals, worst


def to_terminal(header: Header, errors: Sequence[WeightError], worst_count: int = 5) -> Group:
    """Totals by role, the norms of the whole model and the worst weights; colours are rich's to drop (NO_COLOR).

    Raises:
        ValueError: As `totals` and `worst` do.
    """
    by_role = totals(errors)
    blank = Text("")
    parts: list[RenderableType] = [
        Text(f"Quantization error of {header.model}", style="bold"),
        Text(f"Method: {header.method}"),
        Text(f"Coverage: {header.reach}"),
        *(Text(f"Left: {left.pattern} ({left_line(left)})") for left in header.coverage.left),
        *(blank, _role_table(header, by_role)),
        *(blank, _model_table(header, by_role[-1])),
    ]
    if worst_count:
        parts += [blank, _worst_table(header, worst(errors, worst_count), len(errors))]
    parts += [
        blank,
        Text(
            f"{header.before}: W quantized as it is. split: Q + B A as stored. bits: stored bits per element of W, "
            "factors included. error: Frobenius norm over that of W. less: reduction in percent. "
            "±: standard error of an estimate."
        ),
    ]
    return Group(*parts)


def _role_table(header: Header, by_role: Sequence[Total]) -> Table:
    norms = ["nuclear\nless %", "spectral\nless %"]
    table = _table("By role", ["role"], ["weights", "elements", "bits", *_error_heads(header), *norms])
    for total in by_role:
        less = reduction(total)
        cells = [f"{total.weights:,}", short_count(total.elements), number(total.bits), *_error_cells(total)]
        last = total is by_role[-1]
        table.add_row(total.role, *cells, _signed(less.nuclear), _signed(less.spectral), style="bold" if last else None)
    return table


def _model_table(header: Header, whole: Total) -> Table:
    """Every norm of the whole model, in the units of W."""
    table = _table("Whole model, norms of the error", ["norm"], [header.before, "split", "less %"])
    less, (relative_before, relative_after) = reduction(whole), relative(whole)
    table.add_row("relative Frobenius", number(relative_before), number(relative_after), _signed(less.frobenius))
    table.add_row("nuclear, sum", _nuclear(whole.before), _nuclear(whole.after), _signed(less.nuclear))
    spectral = number(whole.before.spectral), number(whole.after.spectral)
    table.add_row("spectral, largest", *spectral, _signed(less.spectral))
    return table


def _worst_table(header: Header, errors: Sequence[WeightError], count: int) -> Table:
    title = f"Worst weights by error of the split ({len(errors)} of {count:,})"
    table = _table(title, ["weight"], ["rank", "bits", *_error_heads(header)])
    for error in errors:
        table.add_row(Text(error.name), str(error.rank), number(error.bits), *_error_cells(error))
    return table


def _table(title: str, words: Sequence[str], numbers: Sequence[str]) -> Table:
    """A table without rows. Its widest column gives way first, and folds: no part of a name or number is lost."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    for head in words:
        table.add_column(head, overflow="fold")
    for head in numbers:
        table.add_column(Text(head), justify="right", overflow="fold")
    return table


def _error_heads(header: Header) -> list[str]:
    return [f"error\n{header.before}", "error\nsplit", "error\nless %"]


def _error_cells(error: WeightError | Total) -> list[str | Text]:
    before, after = relative(error)
    return [number(before), number(after), _signed(reduction(error).frobenius)]


def _nuclear(norms: Norms) -> str:
    return estimate(norms.nuclear, norms.nuclear_error)


def _signed(percent: float) -> Text:
    """A reduction; red where the split is worse."""
    return Text(number(percent), style="red" if percent < 0 else "")
