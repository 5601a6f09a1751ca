"""A WeightError as a JSON object, one per line of errors.jsonl, and back without loss."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, cast, get_type_hints

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qsvd.errors import BadInput
from qsvd.records import Norms, WeightError
from qsvd.report.header import ReportHeader
from qsvd.report.totals import Total, reduction, relative, totals, worst


def to_record(error: WeightError) -> dict[str, Any]:
    """The error as dicts, lists, strings and numbers; json writes its floats so that they come back equal."""
    return asdict(error) | {"shape": list(error.shape)}


def from_record(record: object) -> WeightError:
    """The error that to_record turned into `record`.

    Raises:
        BadInput: record is no object, lacks a field, has one more, or holds something else than the field takes;
            all such faults are named.
    """
    faults = _faults(record, WeightError, "")
    if faults:
        raise BadInput(f"not a record of a weight's error: {'; '.join(faults)}")
    values = dict(cast(Mapping[str, Any], record))
    values["shape"] = tuple(values["shape"])
    for side in ("before", "after"):
        values[side] = _floats(Norms, values[side])
    return _floats(WeightError, values)


def _floats(kind: type, values: Mapping[str, Any]) -> Any:
    """A `kind` of these values, a whole number where it takes a float (JSON writers differ) made one."""
    hints = get_type_hints(kind)
    return kind(**{name: float(value) if hints[name] is float else value for name, value in values.items()})


def _faults(value: object, kind: type, path: str) -> list[str]:
    """Sentences on what keeps `value`, found at `path`, from being a `kind`."""
    if not isinstance(value, Mapping):
        return [f"{path.rstrip('.') or 'the record'} is {value!r}, not an object"]
    names = [field.name for field in fields(kind)]
    missing = [f"{path}{name} is missing" for name in names if name not in value]
    unknown = [f"{path}{name} is unknown" for name in value if name not in names]
    hints = get_type_hints(kind)
    wrong: list[str] = []
    for name in (name for name in names if name in value):
        if hints[name] is Norms:
            wrong += _faults(value[name], Norms, f"{path}{name}.")
        elif not _CHECKS[hints[name]][0](value[name]):
            wrong.append(f"{path}{name} is {value[name]!r}, not {_CHECKS[hints[name]][1]}")
    return missing + unknown + wrong


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_measure(value: object) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value) and value >= 0)


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_is_whole(size) and size > 0 for size in value)


_CHECKS: dict[Any, tuple[Callable[[object], bool], str]] = {
    str: (lambda value: isinstance(value, str), "a string"),
    int: (_is_whole, "a whole number of 0 or more"),
    float: (_is_measure, "a finite number of 0 or more"),
    tuple[int, int]: (_is_shape, "a list of two positive whole numbers"),
}


# Numbers as the cells of a table.


SIGNIFICANT = 4
LARGE = 10.0**SIGNIFICANT  # from here on four digits need an exponent
SMALL = 1e-4


def number(value: float) -> str:
    """Four significant digits: 0.09250, 12.34, 1.235e+04; zero is 0."""
    if value == 0:
        return "0"
    rounded = float(f"{value:.{SIGNIFICANT}g}")  # 9999.7 rounds up to a number of five digits
    if SMALL <= abs(rounded) < LARGE:
        return f"{rounded:#.{SIGNIFICANT}g}".rstrip(".")
    return f"{rounded:.{SIGNIFICANT - 1}e}"


def estimate(value: float, standard_error: float) -> str:
    """A number, with `± standard error` in two digits when it is not exact."""
    return number(value) if standard_error == 0 else f"{number(value)} ± {standard_error:.2g}"


def short_count(count: int) -> str:
    """A count of at most seven characters: 123,456 and then 1.235 M, 1.235 G, 1.235 T."""
    for power, unit in ((12, "T"), (9, "G"), (6, "M")):
        if count >= 10**power:
            return f"{number(count / 10**power)} {unit}"
    return f"{count:,}"


# The report as a JSON object: every number in full, under keys that stay.


def to_json(header: ReportHeader, errors: Sequence[WeightError], worst_count: int = 10) -> dict[str, Any]:
    """What json.dumps takes: the header's fields, then `totals` (the model last), `worst` and `weights` in order.

    Every total and weight has its norms `before` (the codec on W) and `after` (the split), in the units of W, their
    relative Frobenius errors (1 is the norm of W), and `reduction_percent` by norm.

    Raises:
        BadInput: As `totals` and `worst` do.
    """
    coverage = header.coverage
    return asdict(header) | {
        "coverage": asdict(coverage) | {"share": coverage.share, "left": [asdict(left) for left in coverage.left]},
        "totals": [asdict(total) | _derived(total) for total in totals(errors)],
        "worst": [to_record(error) | _derived(error) for error in worst(errors, worst_count)],
        "weights": [to_record(error) | _derived(error) for error in errors],
    }


def _derived(error: WeightError | Total) -> dict[str, Any]:
    before, after = relative(error)
    return {"relative_before": before, "relative_after": after, "reduction_percent": asdict(reduction(error))}


# The report as Markdown: the same records give the same bytes.


NOTES = """\
- **{before}**: the weight W itself, quantized by the same codec. **split**: what is stored, Q + B A, with the factors
  rounded to the type they are stored in. Both are compared with W.
- **bits per element**: all that is stored for the split, factors included, over the elements of W. The factors are what
  a reduction is bought with: {before} does without them.
- **relative error**: Frobenius norm of the error over that of the weight, ‖E‖ / ‖W‖. A row of several weights takes
  them as one: sqrt(sum ‖E‖²) / sqrt(sum ‖W‖²).
- **nuclear norm**: sum of the singular values of the error, in the units of W; the measure of the PiSSA paper
  (arXiv:2404.02948). A row of several weights adds them. A number after ± is the standard error of a stochastic
  estimate: drawn again with other random vectors, about two estimates in three fall within it of the exact norm. It
  covers that chance and nothing else; over several weights standard errors add in squares. Without ± the norm is exact.
- **spectral norm**: largest singular value of the error, in the units of W; of several weights the largest. Beside a
  nuclear norm with ± it is a lower bound, the largest that the same random vectors found.
- **reduction**: 100 (1 - split / {before}), in percent; negative where the split is worse.
- **iteration**: the one whose result was kept, because its error was the least.
- What the factors gain depends on the spectrum of the weight: where the singular values fall fast, a small rank takes
  much of the weight away from the quantizer; where they are nearly equal, it takes little, and the gain is small at any
  number of iterations.
"""


def to_markdown(header: ReportHeader, errors: Sequence[WeightError], worst_count: int = 10) -> str:
    """The whole report: totals by role, the worst weights, every weight in the order given, and what it all means.

    Raises:
        BadInput: As `totals` and `worst` do.
    """
    sections = [
        f"# Quantization error of {_text(header.model)}",
        f"Method: {_text(header.method)}.",
        f"Coverage: {header.reach}.",
        *_left(header),
        "## By role",
        _table([("role", False), ("weights", True), ("elements", True), *_norm_columns(header)], _role_rows(errors)),
        f"## Worst weights by relative error of the split ({min(worst_count, len(errors))} of {len(errors):,})",
        _weight_table(header, worst(errors, worst_count)),
        "## Every weight",
        _weight_table(header, errors),
        "## What the columns mean",
        NOTES.format(before=_text(header.before)).rstrip(),
    ]
    return "\n\n".join(sections) + "\n"


def _left(header: ReportHeader) -> list[str]:
    lines = [f"- {_code(left.pattern)}: {left.size}" for left in header.coverage.left]
    return ["Left as they were:", "\n".join(lines)] if lines else []


def _norm_columns(header: ReportHeader) -> list[tuple[str, bool]]:
    columns = ["bits per element"]
    for norm in ("relative error", "nuclear norm", "spectral norm"):
        columns += [f"{norm}, {header.before}", f"{norm}, split", f"{norm}, reduction (%)"]
    return [(_text(column), True) for column in columns]


def _norm_cells(error: WeightError | Total) -> list[str]:
    relative_before, relative_after = relative(error)
    before, after, less = error.before, error.after, reduction(error)
    return [
        number(error.bits),
        *(number(relative_before), number(relative_after), number(less.frobenius)),
        *(estimate(norm.nuclear, norm.nuclear_error) for norm in (before, after)),
        number(less.nuclear),
        *(number(before.spectral), number(after.spectral), number(less.spectral)),
    ]


def _role_rows(errors: Sequence[WeightError]) -> list[list[str]]:
    return [[total.role, f"{total.weights:,}", f"{total.elements:,}", *_norm_cells(total)] for total in totals(errors)]


def _weight_table(header: ReportHeader, errors: Sequence[WeightError]) -> str:
    names = [("weight", False), ("role", False), ("shape (out x in)", True), ("rank", True), ("iteration", True)]
    rows = [
        [_code(error.name), error.role, _shape(error), str(error.rank), str(error.iteration), *_norm_cells(error)]
        for error in errors
    ]
    return _table(names + _norm_columns(header), rows)


def _shape(error: WeightError) -> str:
    return " x ".join(str(size) for size in error.shape)


def _table(columns: Sequence[tuple[str, bool]], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose source lines up too; a column is its head and whether it holds numbers."""
    widths = [max(len(head), 4, *(len(row[i]) for row in rows)) for i, (head, _) in enumerate(columns)]
    rule = ["-" * (width - 1) + (":" if right else "-") for width, (_, right) in zip(widths, columns, strict=True)]
    lines = [[head for head, _ in columns], rule, *rows]
    return "\n".join("| " + " | ".join(_padded(line, columns, widths)) + " |" for line in lines)


def _padded(cells: Sequence[str], columns: Sequence[tuple[str, bool]], widths: Sequence[int]) -> list[str]:
    return [
        cell.rjust(width) if right else cell.ljust(width)
        for cell, (_, right), width in zip(cells, columns, widths, strict=True)
    ]


def _text(words: str) -> str:
    """Words from outside that stay words: no table cell, emphasis, code, link or tag begins in them."""
    return "".join(f"\\{mark}" if mark in "\\|`*_[]<>" else mark for mark in " ".join(words.split()))


def _code(name: str) -> str:
    return f"`{name}`"


# The report for a terminal of 80 columns or more, as something that rich prints.


def to_terminal(header: ReportHeader, errors: Sequence[WeightError], worst_count: int = 5) -> Group:
    """Totals by role, the norms of the whole model and the worst weights; colours are rich's to drop (NO_COLOR).

    Raises:
        BadInput: As `totals` and `worst` do.
    """
    by_role = totals(errors)
    blank = Text("")
    parts: list[RenderableType] = [
        Text(f"Quantization error of {header.model}", style="bold"),
        Text(f"Method: {header.method}"),
        Text(f"Coverage: {header.reach}"),
        *(Text(f"Left: {left.pattern} ({left.size})") for left in header.coverage.left),
        *(blank, _role_terminal_table(header, by_role)),
        *(blank, _model_terminal_table(header, by_role[-1])),
    ]
    if worst_count:
        parts += [blank, _worst_terminal_table(header, worst(errors, worst_count), len(errors))]
    parts += [
        blank,
        Text(
            f"{header.before}: W quantized as it is. split: Q + B A as stored. bits: stored bits per element of W, "
            "factors included. error: Frobenius norm over that of W. less: reduction in percent. "
            "±: standard error of an estimate."
        ),
    ]
    return Group(*parts)


def _role_terminal_table(header: ReportHeader, by_role: Sequence[Total]) -> Table:
    norms = ["nuclear\nless %", "spectral\nless %"]
    table = _terminal_table("By role", ["role"], ["weights", "elements", "bits", *_error_heads(header), *norms])
    for total in by_role:
        less = reduction(total)
        cells = [f"{total.weights:,}", short_count(total.elements), number(total.bits), *_error_cells(total)]
        last = total is by_role[-1]
        table.add_row(total.role, *cells, _signed(less.nuclear), _signed(less.spectral), style="bold" if last else None)
    return table


def _model_terminal_table(header: ReportHeader, whole: Total) -> Table:
    """Every norm of the whole model, in the units of W."""
    table = _terminal_table("Whole model, norms of the error", ["norm"], [header.before, "split", "less %"])
    less, (relative_before, relative_after) = reduction(whole), relative(whole)
    table.add_row("relative Frobenius", number(relative_before), number(relative_after), _signed(less.frobenius))
    table.add_row("nuclear, sum", _nuclear(whole.before), _nuclear(whole.after), _signed(less.nuclear))
    spectral = number(whole.before.spectral), number(whole.after.spectral)
    table.add_row("spectral, largest", *spectral, _signed(less.spectral))
    return table


def _worst_terminal_table(header: ReportHeader, errors: Sequence[WeightError], count: int) -> Table:
    title = f"Worst weights by error of the split ({len(errors)} of {count:,})"
    table = _terminal_table(title, ["weight"], ["rank", "bits", *_error_heads(header)])
    for error in errors:
        table.add_row(Text(error.name), str(error.rank), number(error.bits), *_error_cells(error))
    return table


def _terminal_table(title: str, words: Sequence[str], numbers: Sequence[str]) -> Table:
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


def _error_heads(header: ReportHeader) -> list[str]:
    return [f"error\n{header.before}", "error\nsplit", "error\nless %"]


def _error_cells(error: WeightError | Total) -> list[str | Text]:
    before, after = relative(error)
    return [number(before), number(after), _signed(reduction(error).frobenius)]


def _nuclear(norms: Norms) -> str:
    return estimate(norms.nuclear, norms.nuclear_error)


def _signed(percent: float) -> Text:
    """A reduction; red where the split is worse."""
    return Text(number(percent), style="red" if percent < 0 else "")
