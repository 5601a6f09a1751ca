"""Large files of rows, read block by block: of one split, .jsonl or .parquet, in one file or in shards.

The rows are those that `read_file` gives. datasets.load_dataset would not hold them in memory either, but it gives
objects of JSON the keys of all others, empty, which chat templates then see.
"""

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy

from qsvd.data.read import SYNONYMS, local_data, shard_files
from qsvd.data.row_files import Places, Problem, Rows, json_lines, parquet_rows, refusal
from qsvd.errors import BadInput
from qsvd.files.atomic import file_digest

LARGE = 64_000_000  # bytes of files; a token takes 160 bytes of memory or more in lists
BLOCK = 2**20  # bytes of rows that are tokenized at once
READERS = {".jsonl": json_lines, ".parquet": parquet_rows}


@dataclass(frozen=True)
class ShardPlaces(Places):
    """The places of rows of several files.

    Args:
        files: The names of the files.
        shards: For each row the index of its file.
    """

    files: tuple[str, ...] = ()
    shards: Any = ()

    def short(self, index: int) -> str:
        name = f"{self.files[self.shards[index]]}, " if len(self.files) > 1 else ""
        return f"{name}{self.unit} {self.numbers[index]}"

    def take(self, indexes: Any) -> "ShardPlaces":
        chosen = numpy.asarray(indexes, dtype=numpy.int64)
        return replace(self, numbers=numpy.asarray(self.numbers)[chosen], shards=numpy.asarray(self.shards)[chosen])


@dataclass(frozen=True)
class RowBlocks:
    """The files of one split, in order, all with one suffix.

    Args:
        source: Its name in messages.
    """

    files: tuple[Path, ...]
    source: str

    @property
    def unit(self) -> str:
        """What a row is in its file."""
        return "line" if self.files[0].suffix.lower() == ".jsonl" else "row"

    @cached_property
    def digests(self) -> list[str]:
        """The digests of the files, in order."""
        return [file_digest(path) for path in self.files]

    def columns(self) -> list[str]:
        """Return the names of the columns that have a value in any row; reads everything.

        Raises:
            BadInput: no rows; broken lines (all of a file are counted, the first few are shown).
        """
        names: dict[str, None] = {}
        rows = 0
        for shard in range(len(self.files)):
            for _, row, _ in self._rows(shard):
                names |= {name: None for name, value in row.items() if value is not None}
                rows += 1
        if not rows:
            raise BadInput(f"{self.source} is empty: it has no rows")
        return list(names)

    def blocks(self) -> Generator[Rows]:
        """Yield the rows, in blocks of about BLOCK bytes."""
        for shard in range(len(self.files)):
            rows, numbers, size = list[dict[str, Any]](), list[int](), 0
            for number, row, num_bytes in self._rows(shard):
                rows.append(row)
                numbers.append(number)
                size += num_bytes
                if size >= BLOCK:
                    yield self._block(shard, rows, numbers)
                    rows, numbers, size = [], [], 0
            if rows:
                yield self._block(shard, rows, numbers)

    def first(self) -> Rows:
        """Return the first block."""
        with closing(self.blocks()) as found:
            return next(found)

    def places(self, numbers: Any, shards: Any) -> ShardPlaces:
        """Return the places of rows: their numbers in their files, and the indexes of these."""
        return ShardPlaces(self.source, self.unit, numbers, tuple(path.name for path in self.files), shards)

    def _block(self, shard: int, rows: list[dict[str, Any]], numbers: list[int]) -> Rows:
        return Rows(rows, self.places(numbers, [shard] * len(numbers)))

    def _rows(self, shard: int) -> Generator[tuple[int, dict[str, Any], int]]:
        path, broken = self.files[shard], list[Problem]()
        yield from READERS[path.suffix.lower()](path, broken)
        if broken:
            raise BadInput(refusal(path, "broken line", broken))


def large_rows(source: str, split: str) -> RowBlocks | None:
    """Return the rows of a split in blocks if its files are large and can be read so, else None.

    Raises:
        BadInput: as `read_rows` for files that are not there, or two that are one split.
    """
    local = local_data(source)
    if local is None:
        return None
    if local.is_dir():
        files = shard_files(local, SYNONYMS if split in SYNONYMS else (split,))
    else:
        files = (local,) if split == "train" else ()
    if not files or any(path.suffix.lower() not in READERS for path in files):
        return None
    return RowBlocks(files, str(local)) if sum(path.stat().st_size for path in files) >= LARGE else None
