"""The error of every weight: one JSON object a line in errors.jsonl, and a report as JSON, as Markdown, on a terminal.

Markdown and terminal tables are made of the same columns, COLUMNS.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qsvd.errors import listing
from qsvd.records import Norms, WeightError, stored
from qsvd.report.card import code, markdown
from qsvd.report.header import ReportHeader
from qsvd.report.totals import MODEL, Total, reduction, relative, totals, worst


def to_record(error: WeightError) -> dict[str, Any]:
    """Return the error as dicts, lists, strings and numbers; json writes its floats without loss."""
    record = asdict(error) | {"shape": list(error.shape)}
    return record if error.weighted else {name: value for name, value in record.items() if name != "weighted"}


def from_record(record: object) -> WeightError:
    """Return the error that to_record turned into `record`.

    Raises:
        BadInput: record is not that of an error; see `stored`.
    """
    return stored(WeightError, record, "not a record of a weight's error")


# Numbers as the cells of a table.


SIGNIFICANT = 4
LARGE = 10.0**SIGNIFICANT  # from here on four digits need an exponent
SMALL = 1e-4


def number(value: float) -> str:
    """Return four significant digits: 0.09250, 12.34, 1.235e+04; zero is 0."""
    if value == 0:
        return "0"
    rounded = float(f"{value:.{SIGNIFICANT}g}")  # 9999.7 rounds up to a number of five digits
    if SMALL <= abs(rounded) < LARGE:
        return f"{rounded:#.{SIGNIFICANT}g}".rstrip(".")
    return f"{rounded:.{SIGNIFICANT - 1}e}"


def estimate(value: float, standard_error: float) -> str:
    """Return a number, with `± standard error` in two digits if it is not exact."""
    return number(value) if standard_error == 0 else f"{number(value)} ± {standard_error:.2g}"


def short_count(count: int) -> str:
    """Return a count in at most seven characters: 123,456 and then 1.235 M, 1.235 G, 1.235 T."""
    for power, unit in ((12, "T"), (9, "G"), (6, "M")):
        if count >= 10**power:
            return f"{number(count / 10**power)} {unit}"
    return f"{count:,}"


# The report as a JSON object.


def to_json(header: ReportHeader, errors: Sequence[WeightError], worst_count: int = 10) -> dict[str, Any]:
    """Return the report for json.dumps: the header's fields, `totals` (the model last), `worst` and `weights`.

    Every total and weight has its norms `before` (codec(W)) and `after` (Q + B A), in the units of W, their relative
    Frobenius errors (1 is the norm of W), and `reduction_percent` by norm. Numbers are not rounded.

    Raises:
        BadInput: as `totals` and `worst`.
    """
    coverage = header.coverage
    return asdict(header) | {
        "coverage": asdict(coverage) | {"share": coverage.share},
        "totals": [asdict(total) | _derived(total) for total in totals(errors)],
        "worst": [to_record(error) | _derived(error) for error in worst(errors, worst_count)],
        "weights": [to_record(error) | _derived(error) for error in errors],
    }


def _derived(error: WeightError | Total) -> dict[str, Any]:
    before, after = relative(error)
    return {"relative_before": before, "relative_after": after, "reduction_percent": asdict(reduction(error))}


# The columns of the tables.


@dataclass(frozen=True)
class Column:
    """A column: its head, the cell of a WeightError or a Total, and a narrow head for a terminal where it differs.

    {before} in a head stands for ReportHeader.before.
    """

    head: str
    cell: Callable[[Any], str]
    narrow: str = ""
    is_number: bool = True


COLUMNS = {
    "type": Column("layer type", lambda e: "all" if e.role == MODEL else e.role, "layer\ntype", is_number=False),
    "layer": Column("layer", lambda e: e.name.removesuffix(".weight"), is_number=False),
    "layers": Column("layers", lambda e: f"{e.weights:,}"),
    "elements": Column("elements", lambda e: short_count(e.elements)),
    "shape": Column("shape (out x in)", lambda e: f"{e.shape[0]} x {e.shape[1]}"),
    "rank": Column("rank", lambda e: str(e.rank)),
    "iteration": Column("iteration", lambda e: str(e.iteration)),
    "bits": Column("bits per element", lambda e: number(e.bits), "bits per\nelement"),
    "error before": Column("relative error, {before}", lambda e: number(relative(e)[0]), "error\n{before}"),
    "error after": Column(
        "relative error, with components", lambda e: number(relative(e)[1]), "error with\ncomponents"
    ),
    "error less": Column("relative error, reduction (%)", lambda e: number(reduction(e).frobenius), "reduced\nby (%)"),
    "nuclear before": Column("nuclear norm, {before}", lambda e: _nuclear(e.before)),
    "nuclear after": Column("nuclear norm, with components", lambda e: _nuclear(e.after)),
    "nuclear less": Column("nuclear norm, reduction (%)", lambda e: number(reduction(e).nuclear), "nuclear\nby (%)"),
    "spectral before": Column("spectral norm, {before}", lambda e: number(e.before.spectral)),
    "spectral after": Column("spectral norm, with components", lambda e: number(e.after.spectral)),
    "spectral less": Column(
        "spectral norm, reduction (%)", lambda e: number(reduction(e).spectral), "spectral\nby (%)"
    ),
}
PARTS = ("before", "after", "less")
ERROR = tuple(f"error {part}" for part in PARTS)
NORMS = ("bits", *ERROR, *(f"{norm} {part}" for norm in ("nuclear", "spectral") for part in PARTS))


def _nuclear(norms: Norms) -> str:
    return estimate(norms.nuclear, norms.nuclear_error)


def weighted_in_words(header: ReportHeader, errors: Sequence[WeightError]) -> str:
    """Return the weighted error of the model, and the layers that kept nearest codes, in sentences; "" without it."""
    known = [(error.name.removesuffix(".weight"), error.weighted) for error in errors if error.weighted is not None]
    if not known:
        return ""
    squares = (sum(getattr(weighted, part) ** 2 for _, weighted in known) for part in ("before", "after"))
    before, after = (number(sqrt(square / len(known))) for square in squares)
    words = (
        f"Relative error weighted by {header.weighted_by}, root mean square over {len(known):,} layers: {before} by "
        f"{header.before}, {after} with components."
    )
    kept = [name for name, weighted in known if weighted.kept_nearest]
    if kept:
        words += f" Error feedback was not better in {len(kept):,} of them, which keep nearest codes: {listing(kept)}."
    return words


# The report as Markdown: the same records give the same bytes.


NOTES = """\
- **{before}**: the weight W, quantized by the same codec without components. **with components**: what is stored, the
  residual plus the components, Q + B A. Both are compared with W.
- **bits per element**: all stored bits, components included, divided by the number of elements of W. The components
  cost these bits; {before} stores none.
- **relative error**: Frobenius norm of the error divided by that of the weight, ‖E‖ / ‖W‖. For several layers:
  sqrt(sum ‖E‖²) / sqrt(sum ‖W‖²).
- **nuclear norm**: sum of the singular values of the error, in the units of W; the measure of the PiSSA paper
  (arXiv:2404.02948). For several layers: the sum. The number after ± is the standard error of a stochastic estimate:
  with other random vectors, about two estimates in three are within it of the exact norm. For several layers, standard
  errors add in squares. Without ± the norm is exact.
- **spectral norm**: largest singular value of the error, in the units of W. For several layers: the largest. If the
  nuclear norm has a ±, the spectral norm is a lower bound, the largest value that the same random vectors found.
- **reduction**: 100 (1 - with components / {before}), in percent. Negative: the error is larger with components.
- **iteration**: the iteration that was kept, because its error was the smallest.
- The gain depends on the spectrum of the weight. If the singular values fall fast, components of a small rank hold much
  of the weight, and less is left to quantize. If they are nearly equal, the gain is small at any number of iterations.
"""


def to_markdown(header: ReportHeader, errors: Sequence[WeightError], worst_count: int = 10) -> str:
    """Return the whole report: totals by layer type, the worst layers, all layers in the order given, an explanation.

    Raises:
        BadInput: as `totals` and `worst`.
    """
    each = ("layer", "type", "shape", "rank", "iteration", *NORMS)
    left, unknown = (
        "\n".join(f"- {code(group.pattern)}: {group.size}" for group in groups)
        for groups in (header.coverage.left, header.coverage.unknown)
    )
    sections = [
        f"# Quantization error of {markdown(header.model)}",
        f"Method: {markdown(header.method)}.",
        f"Coverage: {header.reach}.",
        *([markdown(weighted)] if (weighted := weighted_in_words(header, errors)) else []),
        *(["Not quantized:", left] if left else []),
        *(["Copied, since the model has no such tensors:", unknown] if unknown else []),
        "## By layer type",
        _markdown_table(header, ("type", "layers", "elements", *NORMS), totals(errors)),
        f"## Layers with the largest relative error ({min(worst_count, len(errors))} of {len(errors):,})",
        _markdown_table(header, each, worst(errors, worst_count)),
        "## Every layer",
        _markdown_table(header, each, errors),
        "## What the columns mean",
        NOTES.format(before=markdown(header.before)).rstrip(),
    ]
    return "\n\n".join(sections) + "\n"


def totals_table(header: ReportHeader, errors: Sequence[WeightError]) -> str:
    """Return the relative errors of every layer type and of the model as a Markdown table."""
    return _markdown_table(header, ("type", "layers", "bits", *ERROR), totals(errors))


def _markdown_table(header: ReportHeader, keys: Sequence[str], rows: Sequence[WeightError | Total]) -> str:
    """Return a Markdown table whose source is aligned too."""
    columns = []
    for key in keys:
        column = COLUMNS[key]
        cells = [code(column.cell(row), in_table=True) if key == "layer" else column.cell(row) for row in rows]
        head = markdown(column.head.format(before=header.before))
        width = max(map(len, (head, "----", *cells)))
        rule = "-" * (width - 1) + (":" if column.is_number else "-")
        columns.append([f"{cell:{'>' if column.is_number else '<'}{width}}" for cell in (head, rule, *cells)])
    return "\n".join("| " + " | ".join(line) + " |" for line in zip(*columns, strict=True))


# The report for a terminal of 80 columns or more, as something that rich prints.


def to_terminal(header: ReportHeader, errors: Sequence[WeightError], worst_count: int = 5) -> Group:
    """Return totals by layer type, the norms of the whole model and the worst layers; NO_COLOR switches colours off.

    Raises:
        BadInput: as `totals` and `worst`.
    """
    by_type = totals(errors)
    types = ("type", "layers", "elements", "bits", *ERROR, "nuclear less", "spectral less")
    parts: list[RenderableType] = [
        Text(f"Quantization error of {header.model}", style="bold"),
        Text(f"Method: {header.method}"),
        Text(f"Coverage: {header.reach}"),
        *(Text(f"Not quantized: {left.pattern} ({left.size})") for left in header.coverage.left),
        *([Text(f"Copied, since the model has no such tensors: {header.remainder}")] if header.remainder else []),
        *(Text(""), _rich_table("Error by layer type", header, types, by_type)),
        *(Text(""), _whole_model(header, by_type[-1])),
        *((Text(""), Text(weighted)) if (weighted := weighted_in_words(header, errors)) else ()),
    ]
    if worst_count:
        found = worst(errors, worst_count)
        title = f"Layers with the largest error ({len(found)} of {len(errors):,})"
        parts += [Text(""), _rich_table(title, header, ("layer", "rank", "bits", *ERROR), found)]
    legend = (
        f"{header.before}: W quantized without components. with components: Q + B A as stored. bits per "
        "element: all stored bits, components included. error: Frobenius norm of the error over that of W. nuclear, "
        "spectral: reduction of these norms of the error. ±: standard error of an estimate."
    )
    return Group(*parts, Text(""), Text(legend))


def _rich_table(title: str, header: ReportHeader, keys: Sequence[str], rows: Sequence[WeightError | Total]) -> Table:
    columns = [COLUMNS[key] for key in keys]
    heads = [(column.narrow or column.head).format(before=header.before) for column in columns]
    table = terminal_table(title, heads[:1], heads[1:])
    for row in rows:
        cells = [_colored(column.cell(row)) for column in columns]
        table.add_row(*cells, style="bold" if row.role == MODEL else None)
    return table


def _whole_model(header: ReportHeader, whole: Total) -> Table:
    """Return every norm of the error of the whole model, in the units of W."""
    table = terminal_table(
        "Error of the whole model", ["norm of the error"], [header.before, "with components", "reduced by (%)"]
    )
    words = {"error": "relative Frobenius", "nuclear": "nuclear, sum", "spectral": "spectral, largest"}
    for norm, name in words.items():
        table.add_row(name, *(_colored(COLUMNS[f"{norm} {part}"].cell(whole)) for part in PARTS))
    return table


def terminal_table(title: str, words: Sequence[str], numbers: Sequence[str]) -> Table:
    """Return a table without rows. If it is too wide, its widest column folds: no part of a name or number is lost."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
        show_edge=False,
    )
    for head in words:
        table.add_column(head, overflow="fold")
    for head in numbers:
        table.add_column(Text(head), justify="right", overflow="fold")
    return table


def _colored(cell: str) -> Text:
    """Return a cell, in red if it is negative: a reduction that is none."""
    return Text(cell, style="red" if cell.startswith("-") else "")
