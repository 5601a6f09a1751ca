"""The rows of the comparison: in a file while they are made, and in a table in Markdown."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

COLUMNS = {  # of a table: key of a row -> head, format
    "bits": ("bits per weight", "{:.3f}"),
    "frobenius": ("Frobenius", "{:.4f}"),
    "output calibration": ("output, calibration", "{:.4f}"),
    "output held out": ("output, held out", "{:.4f}"),
    "loss calibration": ("H and G, calibration", "{:.4f}"),
    "loss held out": ("H and G, held out", "{:.4f}"),
    "output drawn": ("output", "{:.4f}"),
    "loss drawn": ("H and G", "{:.4f}"),
    "divergence": ("KL x 1000", "{:.3f}"),
    "agreement": ("same top token, %", "{:.2f}"),
    "perplexity": ("perplexity", "{:.3f}"),
    "hidden": ("final hidden states", "{:.4f}"),
    "seconds": ("seconds", "{:.1f}"),
}
FACTORS = {"divergence": 1000, "agreement": 100}
Row = dict[str, Any]


class Table:
    """Rows in a file, in the order in which they were made."""

    def __init__(self, path: Path, again: Iterable[str] = ()):
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        self.rows: list[Row] = [row for row in map(json.loads, lines) if row["method"] not in again]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{json.dumps(row)}\n" for row in self.rows), encoding="utf-8")

    def has(self, **keys: Any) -> bool:
        """Whether there is a row with these values."""
        return any(all(row.get(key) == value for key, value in keys.items()) for row in self.rows)

    def add(self, rows: list[Row]) -> None:
        """Append rows; all of them or, if the process ends before, none."""
        self.rows += rows
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{json.dumps(row)}\n" for row in rows))


def cells(row: Row) -> dict[str, str]:
    """Return what a table shows of a row, by the heads of its columns."""
    return {
        head: form.format(FACTORS.get(key, 1) * row[key])
        for key, (head, form) in COLUMNS.items()
        if row.get(key) is not None
    }


def markdown(rows: Sequence[Row], names: Sequence[str]) -> str:
    """Return a table of rows, whose first columns are these keys."""
    heads = list(cells(rows[0]))
    lines = [" | ".join((*names, *heads)), " | ".join(("---",) * len(names) + ("---:",) * len(heads))]
    lines += [" | ".join((*(str(row[name]) for name in names), *cells(row).values())) for row in rows]
    return "".join(f"| {line} |\n" for line in lines)
