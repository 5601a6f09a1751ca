"""Files that are complete or do not exist: written under another name, synced to the disk, then renamed.

Also the small text and JSON files themselves. Nothing here imports torch.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from qsvd.errors import BadInput


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open PATH.partial for writing; rename it to `path` when the block succeeds, remove it when the block fails.

    Raises:
        OSError: the file cannot be written; it names the path.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a failed write does not say where
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8."""
    with whole_file(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: object) -> None:
    """Write an indented JSON file in UTF-8, with a final newline."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_object(path: Path, advice: str = "download or write it again") -> dict[str, Any]:
    """Read a JSON object.

    Args:
        advice: What to do about a damaged file, for the sentence of an error.

    Raises:
        BadInput: the file is not valid JSON, or something other than an object.
    """
    try:
        table = json.loads(path.read_bytes())
    except ValueError as error:
        raise BadInput(f"{path} is not valid JSON ({error}); {advice}") from error
    if not isinstance(table, dict):
        raise BadInput(f"{path} is a JSON {type(table).__name__}, not an object; {advice}")
    return table


def file_sha256(path: Path) -> str:
    """Return the SHA-256 digest of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
