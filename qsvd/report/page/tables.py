"""Tables of the page: with a caption, heads for rows and columns, and marks for the script that sorts and filters."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from qsvd.report.page.markup import Child, Markup, shortened, tag


@dataclass(frozen=True)
class Head:
    """The head of a column.

    Args:
        is_number: Whether the column is aligned to the right and sorted by size.
        is_minor: Whether a phone leaves it out.
    """

    name: str
    is_number: bool = True
    is_minor: bool = False

    @property
    def look(self) -> str | None:
        """Return the classes of its cells."""
        return " ".join(word for word, holds in (("n", self.is_number), ("minor", self.is_minor)) if holds) or None


def table(
    caption: str, heads: Sequence[Head], rows: Sequence[Sequence[Child]], *, sorts: bool = False, total: bool = False
) -> Markup:
    """Return a table whose first column is the head of each row.

    Args:
        sorts: Whether the script makes buttons of the heads.
        total: Whether the last row is the sum of the others.
    """
    head = tag("tr", (tag("th", one.name, scope="col", class_=one.look) for one in heads))
    lines = [_row(heads, row) for row in rows]
    foot = tag("tfoot", lines.pop()) if total and lines else None
    whole = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", lines), foot,
                class_="sorts" if sorts else None)  # fmt: skip
    return tag("div", whole, class_="scroll", tabindex="0", role="region", aria_label=caption)


def _row(heads: Sequence[Head], row: Sequence[Child]) -> Markup:
    first, *others = row
    cells = [tag("td", cell, class_=one.look) for one, cell in zip(heads[1:], others, strict=True)]
    return tag("tr", tag("th", first, scope="row", class_=heads[0].look), cells)


def name_cell(name: str) -> Markup:
    """Return a name, cut if it is very long, that may break after each dot, and anywhere if it must."""
    parts = re.split(r"(?<=[./])", shortened(name))
    breaks = [tag("wbr")] * len(parts)
    return tag("span", (piece for pair in zip(parts, breaks, strict=True) for piece in pair), class_="name")


def command(line: str) -> Markup:
    """Return a command line to copy."""
    return tag("pre", tag("code", line), tabindex="0")
