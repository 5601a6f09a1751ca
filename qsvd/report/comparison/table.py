"""The table of a comparison as Markdown, and its results as JSON lines."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from qsvd.report.card import markdown
from qsvd.report.comparison.results import RowResult, detectable

FEW = 6  # seeds below which the table says what a test of so few can show


def result_lines(head: Mapping[str, Any], rows: Sequence[RowResult], left_out: Sequence[Mapping[str, str]]) -> str:
    """Return results.jsonl: the comparison, its rows in order, and what was left out; nothing of the machine."""
    records = [
        {"kind": "comparison", **head},
        *({"kind": "row", **asdict(row)} for row in rows),
        *({"kind": "left out", **one} for one in left_out),
    ]
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def comparison_table(
    head: Mapping[str, Any], rows: Sequence[RowResult], left_out: Sequence[Mapping[str, str]], plots: Sequence[str]
) -> str:
    """Return table.md.

    Args:
        plots: Names of pictures next to it.
    """
    has_accuracy = any(row.test_accuracy is not None for row in rows)
    parts = [
        f"# Methods compared on {head['model']}",
        f"```sh\n{head['command']}\n```",
        "\n".join(_said(head, rows)),
        "\n".join(_results(rows, has_accuracy=has_accuracy)),
        "\n".join(f"![{name}]({name})" for name in plots),
        "## Learning rates",
        "Validation loss of the first seed by learning rate.",
        "\n".join(_sweeps(rows)),
    ]
    if left_out:
        lines = ["| method | split | reason |", "| --- | --- | --- |"]
        lines += [f"| {_cell(o['method'])} | {_cell(o['split'])} | {_cell(o['reason'])} |" for o in left_out]
        parts += ["## Left out", "\n".join(lines)]
    return "\n\n".join(part for part in parts if part) + "\n"


Planned = tuple[str, str, int | None, int, int, tuple[float, ...]]  # method, split, rank, parameters, bytes, rates


def planned_rows(head: Mapping[str, Any], rows: Sequence[Planned], left_out: Sequence[Mapping[str, str]]) -> str:
    """Return the rows before they are trained, and what is left out, as Markdown."""
    lines = [
        f"Equal {head['equal']}: {head['size']:,}. Examples: "
        + ", ".join(f"{count:,} to {name}" for name, count in head["examples"].items()),
        "",
        "| method | split | rank | trained parameters | bytes | first rates |",
        "| --- | --- | ---: | ---: | ---: | --- |",
    ]
    for method, split, rank, parameters, num_bytes, rates in rows:
        shown = (
            f"{'' if rank is None else rank} | {parameters:,} | {num_bytes:,} | {', '.join(f'{r:g}' for r in rates)}"
        )
        lines.append(f"| {_cell(method)} | {_cell(split)} | {shown} |")
    lines += [f"Left out: {_cell(one['method'])} {_cell(one['split'])}: {_cell(one['reason'])}" for one in left_out]
    return "\n".join(lines)


def _said(head: Mapping[str, Any], rows: Sequence[RowResult]) -> list[str]:
    """Return what the reader has to know of the numbers."""
    n, limit = head["seeds"], head["size"]
    same = f"rank {limit}" if head["equal"] == "rank" else f"at most {limit:,} {head['equal']}"
    said = [
        f"- Equal: {same}. Bytes are those of the quantized model and the adapter in 16 bits, by plan.",
        "- The learning rate of a row is the best of its sweep by the validation loss of the first seed. The test part "
        "chose nothing.",
        f"- Test: mean ± standard deviation over {n} seed{'s' if n > 1 else ''}, nats.",
    ]
    if any(not row.is_tuned for row in rows):
        said.append("- **not tuned** marks rows whose learning rate no sweep chose: do not rank them with the others.")
    if n > 1 and len(rows) > 1:
        said.append(
            "- p: paired t-test against the first row over seeds, and with Holm's correction for the number of rows."
        )
    if 1 < n < FEW:
        said.append(
            f"- With {n} seeds the test is weak: it finds a difference in 4 of 5 cases only if that is "
            f"{detectable(n):.1f} standard errors. A large p does not say that two rows are equal."
        )
    return said


def _results(rows: Sequence[RowResult], *, has_accuracy: bool) -> list[str]:
    heads = ["method", "split", "rank", "trained parameters", "bytes", "best rate", "test loss"]
    heads += ["test accuracy"] if has_accuracy else []
    heads += ["difference", "p", "p (Holm)", "n"]
    lines = [f"| {' | '.join(heads)} |", f"| --- | --- | {' | '.join('---:' for _ in heads[2:])} |"]
    for row in rows:
        paired = row.paired
        cells = [_cell(row.method) + (f" (**{row.note}**)" if row.note else ""), _cell(row.split)]
        cells += [f"{row.stored_rank or '' if row.rank is None else row.rank}"]
        cells += [f"{row.trained_parameters or row.adapter_parameters:,}", f"{row.num_bytes:,}"]
        cells.append("diverged" if row.best_rate is None else f"{row.best_rate:g}")
        cells.append(_spread(row.test_loss, row.test_loss_deviation, ".4f") + _stopped(row))
        cells += [_spread(row.test_accuracy, row.test_accuracy_deviation, ".2%")] if has_accuracy else []
        cells.append("" if paired is None else f"{paired.difference:+.4f}")
        cells += ["" if paired is None or p is None else f"{p:.2g}" for p in (paired and paired.p, _holm(row))]
        cells.append("" if paired is None else str(paired.n))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _holm(row: RowResult) -> float | None:
    return None if row.paired is None else row.paired.p_holm


def _stopped(row: RowResult) -> str:
    count = sum(one.stopped is not None for one in row.seeds)
    return f", {count} of {len(row.seeds)} diverged" if count else ""


def _spread(mean: float | None, deviation: float | None, form: str) -> str:
    if mean is None:
        return ""
    return f"{mean:{form}}" if deviation is None else f"{mean:{form}} ± {deviation:{form}}"


def _sweeps(rows: Sequence[RowResult]) -> list[str]:
    lines = ["| method | split | validation loss by learning rate |", "| --- | --- | --- |"]
    for row in rows:
        tried = [
            f"{'**' if one.learning_rate == row.best_rate else ''}{one.learning_rate:g}: "
            f"{'diverged' if one.valid_loss is None else format(one.valid_loss, '.4f')}"
            f"{'**' if one.learning_rate == row.best_rate else ''}"
            for one in row.rates
        ]
        lines.append(f"| {_cell(row.method)} | {_cell(row.split)} | {', '.join(tried)} |")
    return lines


def _cell(text: str) -> str:
    return markdown(text)
