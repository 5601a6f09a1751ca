"""One file of rows, as JSON, JSON lines, CSV, Parquet or plain text, with the place of every row.

datasets.load_dataset gives the same rows, but not their line numbers, which messages need.
"""

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qsvd.errors import BadInput, first_line, listing

Problem = tuple[str, str]  # a place, "line 3", and what is wrong there
BOM = b"\xef\xbb\xbf"  # some editors write it in front of UTF-8
ROWS_AT_ONCE = 1000  # of a Parquet file
LARGEST_CELL = 2**31 - 1  # bytes of a CSV cell; Python's own limit of 128 KiB is below a long document


@dataclass(frozen=True)
class Places:
    """The place of each row.

    unit is "line" (the first line of the row), "item" of a JSON list, "row" of a table, or "" for a row that is a
    whole file. numbers count from 1.
    """

    source: str
    unit: str
    numbers: Sequence[int]

    def short(self, index: int) -> str:
        """Return the place within the source, "line 3"."""
        return f"{self.unit} {self.numbers[index]}" if self.unit else "the file"

    def where(self, index: int) -> str:
        """Return the place with its source, "train.jsonl, line 3"."""
        return f"{self.source}, {self.short(index)}" if self.unit else self.source

    def take(self, indexes: Sequence[int]) -> "Places":
        """Return the places of some rows, in the order given; a row may be repeated."""
        return Places(self.source, self.unit, [self.numbers[index] for index in indexes])


@dataclass(frozen=True)
class Rows:
    """A data set: a dictionary by column for each row, and its place."""

    rows: list[dict[str, Any]]
    places: Places


def refusal(source: str | Path, what: str, problems: Sequence[Problem]) -> str:
    """Return a sentence with the number of problems and the first few: "t.jsonl: 2 broken lines: line 3 (...), ..."."""
    plural = what if len(problems) == 1 else f"{what}s"
    return f"{source}: {len(problems)} {plural}: {listing([f'{place} ({wrong})' for place, wrong in problems])}"


def read_file(path: Path) -> Rows:
    """Return all rows of a file; its suffix (SUFFIXES) tells the format.

    Text is UTF-8, with or without a byte order mark; empty lines are skipped. A .txt file is one row {"text": all of
    it}. A .json file is a list of objects, or one object per line.

    Raises:
        BadInput: unknown suffix, no rows, broken lines (all are counted, the first few are shown), or a table without
            column names.
    """
    if path.suffix.lower() not in READERS:
        raise BadInput(f"{path} has the suffix {path.suffix!r}; known suffixes are {', '.join(READERS)}")
    rows = READERS[path.suffix.lower()](path)
    if not rows.rows:
        raise BadInput(f"{path} is empty: it has no rows")
    return rows


def json_lines(path: Path, broken: list[Problem]) -> Iterator[tuple[int, dict[str, Any], int]]:
    """Yield the rows of JSON lines, the line and the bytes of each; lines that cannot be read are added to `broken`."""
    with path.open("rb") as file:  # as bytes, lines end at b"\n" only: JSON allows U+2028 and others inside a string
        for number, line in enumerate(file, 1):
            raw = line.removeprefix(BOM) if number == 1 else line
            if not raw.strip():
                continue
            try:
                row = _parse_row(raw)
            except ValueError as error:
                broken.append((f"line {number}", str(error)))
                continue
            yield number, row, len(raw)


def _read_json_lines(path: Path) -> Rows:
    broken: list[Problem] = []
    found = [(number, row) for number, row, _ in json_lines(path, broken)]
    if broken:
        raise BadInput(refusal(path, "broken line", broken))
    return Rows([row for _, row in found], Places(str(path), "line", [number for number, _ in found]))


def _read_json(path: Path) -> Rows:
    text = _read_text(path)
    if text.lstrip()[:1] != "[":
        try:
            return _read_json_lines(path)
        except ValueError as error:
            raise BadInput(
                f"{error}; a .json file holds a list of objects, [{{...}}, {{...}}], or one object per line"
            ) from error
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadInput(f"{path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from error
    except RecursionError as error:
        raise BadInput(f"{path} is not a list of rows: it is nested too deeply") from error
    broken: list[Problem] = []
    for number, item in enumerate(items, 1):
        try:
            _check_row(item, may_have_surrogates="\\u" in text)
        except ValueError as error:
            broken.append((f"item {number}", str(error)))
    if broken:
        raise BadInput(refusal(path, "broken item", broken))
    return Rows(items, Places(str(path), "item", range(1, len(items) + 1)))


def _read_csv(path: Path) -> Rows:
    rows, numbers, broken = [], [], []
    start = 1  # the line at which the next row begins
    before = csv.field_size_limit(LARGEST_CELL)
    try:
        reader = csv.reader(_decoded_lines(path, broken), strict=True)
        header = _read_header(path, reader)
        while True:
            start = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                broken.append((f"line {start}", str(error)))
                continue
            if len(cells) not in (0, len(header)):
                broken.append((f"line {start}", f"{len(cells)} cells under {len(header)} column names"))
            elif cells:
                rows.append(dict(zip(header, cells, strict=True)))
                numbers.append(start)
    finally:
        csv.field_size_limit(before)
    if broken:
        raise BadInput(refusal(path, "broken line", broken))
    return Rows(rows, Places(str(path), "line", numbers))


def _read_header(path: Path, reader: Iterator[list[str]]) -> list[str]:
    """Return the first row that is not empty; an empty list for an empty file."""
    try:
        header = next((cells for cells in reader if cells), [])
    except csv.Error as error:
        raise BadInput(f"{path} has a broken header: {error}") from error
    doubtful = [repr(name) for number, name in enumerate(header) if not name.strip() or name in header[:number]]
    if doubtful:
        raise BadInput(
            f"{path}: the first line must name each column once, but these are empty or repeated: {listing(doubtful)}"
        )
    return header


def _decoded_lines(path: Path, broken: list[Problem]) -> Iterator[str]:
    """Yield lines with their ends; a line that is not UTF-8 is added to `broken`, and its bad bytes are replaced."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            raw = line.removeprefix(BOM) if number == 1 else line
            try:
                yield raw.decode("utf-8")
            except UnicodeDecodeError as error:
                broken.append((f"line {number}", _not_utf8(error)))
                yield raw.decode("utf-8", errors="replace")


def parquet_rows(path: Path, broken: list[Problem]) -> Iterator[tuple[int, dict[str, Any], int]]:
    """Yield the rows of a Parquet file, the number of each and about its bytes; none is ever `broken`."""
    from pyarrow import ArrowException, parquet

    del broken
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(ROWS_AT_ONCE):
                size = batch.nbytes // max(1, batch.num_rows)
                for row in batch.to_pylist():
                    number += 1
                    yield number, row, size
    except (ArrowException, OSError) as error:
        raise BadInput(f"{path} is not a Parquet file, or is truncated: {first_line(error)}") from error


def _read_parquet(path: Path) -> Rows:
    rows = [row for _, row, _ in parquet_rows(path, [])]
    return Rows(rows, Places(str(path), "row", range(1, len(rows) + 1)))


def _read_document(path: Path) -> Rows:
    text = _read_text(path)
    return Rows([{"text": text}] if text.strip() else [], Places(str(path), "", [1]))


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_document,
}
SUFFIXES = tuple(READERS)


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is {_not_utf8(error)}; save it as UTF-8") from error


def _parse_row(raw: bytes) -> dict[str, Any]:
    try:
        row = json.loads(raw.decode("utf-8").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        raise BadInput(_not_utf8(error)) from error
    except json.JSONDecodeError as error:
        raise BadInput(f"not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise BadInput("nested too deeply") from error
    return _check_row(row, may_have_surrogates=b"\\u" in raw)


def _check_row(row: object, *, may_have_surrogates: bool) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise BadInput(f"a JSON {type(row).__name__}, not an object with a value for each column")
    if may_have_surrogates:  # JSON can hold half a character, which no tokenizer accepts
        try:
            json.dumps(row, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadInput("half of a surrogate pair, which is not a character") from error
    return row


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8: byte 0x{error.object[error.start]:02x} at position {error.start + 1}"
