"""Measured candidates of weights, kept as they come: FILE.costs.jsonl, a line of identity and then a line a weight.

Every line is appended whole and is on the disk before the next weight is measured, so that a killed run goes on; a last
line without its end was cut off and is dropped.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from qsvd.checkpoint.write import differences
from qsvd.decompose.candidates import Measured


class CostsFile:
    """The file, opened for one run; a `with` block lets it go again.

    Args:
        path: Made when the first weight is kept; or left by a run with the same `identity`.
        identity: What the measurements depend on, JSON-able.

    Raises:
        ValueError: the file is of something else (the sentence says what differs) or damaged, or another process is at
            work on it.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]):
        self.path = path
        self._identity = json.loads(json.dumps(identity))
        self._lock = FileLock(path.with_name(f"{path.name}.lock"))
        try:
            self._lock.acquire(blocking=False)
        except Timeout as error:
            raise ValueError(f"another qsvd measures into {path}; wait for it, or stop it") from error
        try:
            self._measured = self._read()
        except BaseException:
            self._let_go()
            raise

    def __enter__(self) -> "CostsFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._let_go()

    @property
    def measured(self) -> Mapping[str, Measured]:
        """What is there, by module."""
        return self._measured

    def keep(self, module: str, measured: Measured) -> None:
        """Append one weight."""
        self._append({"module": module} | asdict(measured))
        self._measured[module] = measured

    def _read(self) -> dict[str, Measured]:
        """What an earlier run measured; the end of a torn line goes."""
        content = self.path.read_bytes() if self.path.is_file() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if not whole:
            if content and not content.startswith(b"{"):
                raise ValueError(f"{self.path} holds no measurements of qsvd; give another --out")
            self.path.unlink(missing_ok=True)
            self._append(self._identity)
            return {}
        if whole != content:
            os.truncate(self.path, len(whole))
        records = []
        for number, line in enumerate(whole.splitlines(), start=1):
            records.append(self._parsed(number, line))
        return dict(records[1:])

    def _parsed(self, number: int, line: bytes) -> tuple[str, Measured]:
        """A line; of the first one, which has to be the identity, nothing."""
        try:
            record = json.loads(line)
            if number > 1:
                return _from_record(record)
            different = differences(record, self._identity)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"line {number} of {self.path} is damaged; delete the file, or give another --out"
            ) from error
        if different:
            raise ValueError(
                f"{self.path} holds measurements with other options: {different}; give the same options, or another "
                "--out, or delete the file"
            )
        return "", Measured((), (), 0.0, (), 0.0)

    def _append(self, record: Mapping[str, Any]) -> None:
        with self.path.open("ab") as file:
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _let_go(self) -> None:
        Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()


def _from_record(record: Mapping[str, Any]) -> tuple[str, Measured]:
    measured = Measured(
        ranks=tuple(record["ranks"]),
        squares=tuple(tuple(map(float, row)) for row in record["squares"]),
        norm=float(record["norm"]),
        values=tuple(map(float, record["values"])),
        nuclear=float(record["nuclear"]),
    )
    return record["module"], measured
