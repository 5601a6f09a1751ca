"""The report as Markdown: the same records give the same bytes."""

from collections.abc import Sequence

from qsvd.decompose.measure import WeightError
from qsvd.report.cells import estimate, number
from qsvd.report.header import Header, left_line
from qsvd.report.totals import Total, reduction, relative, totals, worst

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


def to_markdown(header: Header, errors: Sequence[WeightError], worst_count: int = 10) -> str:
    """The whole report: totals by role, the worst weights, every weight in the order given, and what it all means.

    Raises:
        ValueError: As `totals` and `worst` do.
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


def _left(header: Header) -> list[str]:
    lines = [f"- {_code(left.pattern)}: {left_line(left)}" for left in header.coverage.left]
    return ["Left as they were:", "\n".join(lines)] if lines else []


def _norm_columns(header: Header) -> list[tuple[str, bool]]:
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


def _weight_table(header: Header, errors: Sequence[WeightError]) -> str:
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
