"""Rows of a data set, each with the place it was read from, and the sentence that names those which are refused."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qsvd.plan.listing import listing

Problem = tuple[str, str]  # a place, "line 3", and what is wrong there


@dataclass(frozen=True)
class Places:
    """Where each row was found.

    unit is "line" (the first line of the row), "item" of a JSON list, "row" of a table, or "" for a row that is a
    whole file; numbers count from 1.
    """

    source: str
    unit: str
    numbers: Sequence[int]

    def short(self, index: int) -> str:
        """The place within the source, "line 3"."""
        return f"{self.unit} {self.numbers[index]}" if self.unit else "the file"

    def where(self, index: int) -> str:
        """The place with its source, "train.jsonl, line 3"."""
        return f"{self.source}, {self.short(index)}" if self.unit else self.source

    def take(self, indexes: Sequence[int]) -> "Places":
        """The places of some rows, in the order given; a row may come twice."""
        return Places(self.source, self.unit, [self.numbers[index] for index in indexes])


@dataclass(frozen=True)
class Rows:
    """A data set as it was read: a dictionary by column for each row, and where it stands."""

    rows: list[dict[str, Any]]
    places: Places

    def where(self, index: int) -> str:
        """ "train.jsonl, line 3"."""
        return self.places.where(index)


def refusal(source: str | Path, what: str, problems: Sequence[Problem]) -> str:
    """One sentence that counts all problems and shows the first few: "t.jsonl: 2 broken lines: line 3 (...), ..."."""
    plural = what if len(problems) == 1 else f"{what}s"
    return f"{source}: {len(problems)} {plural}: {listing([f'{place} ({wrong})' for place, wrong in problems])}"
