"""The page of a comparison: its rows at their best learning rates, the sweeps, and the command that repeats it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qsvd.report.errors import number, short_count
from qsvd.report.page.charts import Axis, Series, line_chart
from qsvd.report.page.document import Number, Section, Subject, warnings_section
from qsvd.report.page.markup import Markup, tag
from qsvd.report.page.tables import Head, command, name_cell, table

Record = Mapping[str, Any]  # a line of results.jsonl

HEADS = (
    Head("method", is_number=False),
    Head("split", is_number=False, is_minor=True),
    Head("rank", is_minor=True),
    Head("trained parameters", is_minor=True),
    Head("MB", is_minor=True),
    Head("best rate"),
    Head("test loss"),
    Head("± deviation"),
    Head("accuracy (%)", is_minor=True),
    Head("difference"),
    Head("p (Holm)", is_minor=True),
)


def comparison_subject(name: str, head: Record, rows: Sequence[Record], left_out: Sequence[Record]) -> Subject:
    """Return what a page shows of a comparison.

    Args:
        name: Of the folder.
        head, rows, left_out: The records of results.jsonl (docs/format.md).

    Raises:
        KeyError, TypeError: a record lacks something, or has something else in its place.
    """
    known = [row for row in rows if row["test_loss"] is not None]
    best = min(known, key=lambda row: row["test_loss"], default=None)
    warnings = [f"{row['method']} ({row['split']}): {row['note']}" for row in rows if row["note"]]
    sections = [_results(rows, best), _quality(known), _sweeps(rows)]
    sections += [_left_out(left_out)] if left_out else []
    sections += [warnings_section(warnings), Section("command", "Command", command(head["command"]))]
    losses = {} if best is None else {"lowest test loss": number(best["test_loss"]), "of": best["method"]}
    return Subject(
        name=name,
        kind="comparison",
        sentence=_sentence(head, rows, best),
        numbers=_numbers(head, rows, best),
        sections=sections,
        facts={"model": head["model"], "rows": str(len(rows)), "seeds": str(head["seeds"]), **losses},
        warnings=warnings,
    )


def _equal(head: Record) -> str:
    same = f"rank {head['size']}" if head["equal"] == "rank" else f"at most {head['size']:,} {head['equal']}"
    return f"{same} each"


def _sentence(head: Record, rows: Sequence[Record], best: Record | None) -> str:
    seeds = "1 seed" if head["seeds"] == 1 else f"{head['seeds']} seeds"
    said = f"{len(rows)} rows of a split and a method were trained on {head['model']}, {_equal(head)}, with {seeds}"
    return f"{said}; the lowest test loss is that of {best['method']}." if best else f"{said}; all of them diverged."


def _numbers(head: Record, rows: Sequence[Record], best: Record | None) -> list[Number]:
    runs = sum(len(row["rates"]) + max(len(row["seeds"]) - 1, 0) for row in rows)
    first = rows[0]["test_loss"] if rows else None
    shown = [Number("Rows", str(len(rows)), note=_equal(head)), Number("Runs", f"{runs:,}", note="sweeps and seeds")]
    if best is not None:
        shown.append(Number("Lowest test loss", number(best["test_loss"]), "nats", best["method"]))
    if first is not None:
        shown.append(Number("First row", number(first), "nats", rows[0]["method"]))
    return shown


def _results(rows: Sequence[Record], best: Record | None) -> Section:
    note = (
        "Mean and standard deviation over the seeds on the test part, which neither training nor the choice of the "
        "rate saw. Difference: to the first row, by a paired t-test with Holm's correction. The lowest loss has a star."
    )
    lines = [_row(row, is_best=row is best) for row in rows]
    return Section("results", "Results", table("Rows at their best learning rates", HEADS, lines, sorts=True), note)


def _row(row: Record, *, is_best: bool) -> list[str | Markup]:
    loss, paired = row["test_loss"], row["paired"] or {}
    shown = "diverged" if loss is None else f"{loss:.4f}"
    accuracy = row["test_accuracy"]
    return [
        name_cell(row["method"] + (" (not tuned)" if row["note"] else "")),
        row["split"],
        str(row["rank"] or row["stored_rank"] or ""),
        f"{row['trained_parameters'] or row['adapter_parameters']:,}",
        f"{row['num_bytes'] / 1e6:.2f}",
        "" if row["best_rate"] is None else f"{row['best_rate']:g}",
        tag("b", f"{shown} *") if is_best else shown,
        _shown(row["test_loss_deviation"], ".4f"),
        "" if accuracy is None else f"{100 * accuracy:.2f}",
        _shown(paired.get("difference"), "+.4f"),
        _shown(paired.get("p_holm"), ".2g"),
    ]


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _quality(rows: Sequence[Record]) -> Section:
    """Return the chart of test loss against trained parameters: a point for each row, the first one in its own look."""
    points = [
        Series(
            row["method"],
            [(float(row["trained_parameters"] or row["adapter_parameters"]), row["test_loss"])],
            look=min(place, 1),
            has_dots=True,
            has_line=False,
            is_named=place < 1,
        )
        for place, row in enumerate(rows)
    ]
    x = Axis("trained parameters", includes=(0.0,))
    return Section("quality", "Loss and size", line_chart("Test loss by trained parameters", x, Axis("nats"), points))


def _sweeps(rows: Sequence[Record]) -> Section:
    charts = []
    for row in rows:
        points = [
            (math.log10(rate["learning_rate"]), rate["valid_loss"])
            for rate in row["rates"]
            if rate["valid_loss"] is not None
        ]
        diverged = len(row["rates"]) - len(points)
        title = row["method"] + (f", {diverged} diverged" if diverged else "")
        line = Series("validation loss", points, has_dots=True)
        charts.append(line_chart(title, Axis("log10 of the learning rate"), Axis("nats"), [line]))
    note = "Validation loss of the first seed. A row takes the rate with the lowest."
    return Section("sweeps", "Learning rates", tag("div", charts, class_="charts small"), note)


def _left_out(left_out: Sequence[Record]) -> Section:
    heads = (Head("method", is_number=False), Head("split", is_number=False), Head("reason", is_number=False))
    lines = [[name_cell(one["method"]), one["split"], one["reason"]] for one in left_out]
    body = tag("div", table("Methods without a row", heads, lines), class_="wide")
    return Section("left-out", f"Left out ({short_count(len(left_out))})", body)
