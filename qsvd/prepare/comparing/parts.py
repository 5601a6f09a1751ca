"""The three parts of the data of a comparison: to train, to choose the learning rate, and to test.

A folder has a file for each. One file is divided in 70 : 10 : 20: the rows by a permutation with a fixed seed, in the
order of the file; a text in its order, at ends of lines.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qsvd.data.read import SUFFIXES, local_data, part_files, read_rows
from qsvd.errors import BadInput, listing
from qsvd.files.atomic import file_sha256, write_text

NAMES = ("train", "valid", "test")
VALID_SHARE, TEST_SHARE = 0.1, 0.2
FEWEST = 10  # rows that can be divided


@dataclass(frozen=True)
class Parts:
    """The files of the parts, and the texts of those that are not written yet."""

    files: Mapping[str, Path]
    texts: Mapping[str, str]

    def write(self) -> None:
        """Write the parts of one file, if they are not there."""
        for name, text in self.texts.items():
            path = self.files[name]
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                write_text(path, text)

    @property
    def digests(self) -> dict[str, str]:
        """The SHA-256 digest of each file."""
        return {name: file_sha256(path) for name, path in self.files.items()}


def divide(source: str, out: Path) -> Parts:
    """Return the parts of the data.

    Args:
        source: A folder with train, valid and test, or one file.
        out: Folder of the comparison, for the parts of a file.

    Raises:
        BadInput: a part is missing, or the file cannot be read or has too few rows.
    """
    place = local_data(source)
    if place is None:
        raise BadInput(f"{source} is not here: qsvd compare reads a folder with train, valid and test, or a file")
    if place.is_dir():
        files = part_files(place)
        if lacking := [name for name, path in files.items() if path is None]:
            raise BadInput(
                f"{source} has no file {listing(lacking)} with a suffix of {', '.join(SUFFIXES)}: give a folder with "
                "train, valid and test, or one file, which is divided"
            )
        return Parts({name: path for name, path in files.items() if path is not None}, {})
    rows = read_rows(place).rows
    is_text = place.suffix.lower() == ".txt"
    texts = _cut(rows[0]["text"], source) if is_text else _dealt(rows, source)
    home, suffix = out / "data" / file_sha256(place)[:12], ".txt" if is_text else ".jsonl"
    return Parts({name: home / f"{name}{suffix}" for name in NAMES}, dict(zip(NAMES, texts, strict=True)))


def _cut(text: str, source: str) -> list[str]:
    """Return three parts of a text, which end at ends of lines."""
    places = [0]
    for share in (1 - VALID_SHARE - TEST_SHARE, 1 - TEST_SHARE):
        places.append(text.find("\n", round(share * len(text))) + 1 or len(text))
    parts = [text[start:end] for start, end in zip(places, [*places[1:], len(text)], strict=True)]
    if not all(part.strip() for part in parts):
        raise BadInput(f"{source} has too few lines to be divided into train, valid and test: give a longer text")
    return parts


def _dealt(rows: Sequence[Mapping[str, Any]], source: str) -> list[str]:
    """Return the rows of three parts as JSON lines."""
    if len(rows) < FEWEST:
        raise BadInput(
            f"{source} has {len(rows)} rows, and at least {FEWEST} can be divided into train, valid and test"
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    tests, valids = round(TEST_SHARE * len(rows)), round(VALID_SHARE * len(rows))
    chosen = (order[tests + valids :], order[tests : tests + valids], order[:tests])
    try:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    except TypeError as error:
        raise BadInput(f"{source} has values that are no texts or numbers; give a folder with three files") from error
    return ["".join(f"{lines[index]}\n" for index in sorted(part)) for part in chosen]
