"""The cells of a comparison: one run of one row at one rate and seed, kept as one small file when it is done.

DIR/cells/NAME-DIGEST.json is a record that is complete or absent; what the best cells have measured on the test part is
in NAME-DIGEST.test.json. The name is made of the key of the cell alone, so that any number of processes, one after
another or at once, share the work: who trains a cell holds NAME-DIGEST.lock, which the system releases when a process
dies.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qsvd.errors import BadInput
from qsvd.files.atomic import Lock, read_record, write_record
from qsvd.records import stored

FORMAT = 1  # of a cell
NAME = re.compile(r"[^A-Za-z0-9.+-]+")
AGAIN = "remove it, and the same command measures it again"
LETTERS = 16  # of the digest in a name


@dataclass(frozen=True)
class Result:
    """What a cell has measured.

    Args:
        stopped: Why the run stopped before its last step; None for a complete one.
        steps: Optimizer steps.
        trained_parameters: With a new classification head.
        valid_loss: Nats per trained token, or per example for a classifier.
        valid_accuracy: A share, 0..1; None if it is not a classifier.
        last_loss: Of the last step, on the training data.
    """

    stopped: str | None = None
    steps: int | None = None
    trained_parameters: int | None = None
    valid_loss: float | None = None
    valid_accuracy: float | None = None
    last_loss: float | None = None


@dataclass(frozen=True)
class Test:
    """What a cell has measured on the test part: the loss as above, and the accuracy of a classifier."""

    test_loss: float
    test_accuracy: float | None = None


@dataclass(frozen=True)
class Cell:
    """One run: its key holds all that its numbers depend on.

    Args:
        name: For people, at the head of its file's name.
        key: Values of JSON.
    """

    name: str
    key: Mapping[str, Any] = field(hash=False)

    @property
    def file(self) -> str:
        """The name of its files, without a suffix."""
        text = json.dumps(self.key, sort_keys=True, ensure_ascii=False)
        return f"{NAME.sub('_', self.name)[:60]}-{hashlib.sha256(text.encode()).hexdigest()[:LETTERS]}"


class Cells:
    """The finished cells in a folder.

    Args:
        folder: DIR/cells; made if it does not exist.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._results: dict[str, Result] = {}
        self._tests: dict[str, Test] = {}
        self._machines: dict[str, dict[str, Any]] = {}

    def result(self, cell: Cell) -> Result | None:
        """Return what a cell has measured; None if it is not done."""
        if cell.file not in self._results and (record := self._read(f"{cell.file}.json")) is not None:
            self._machines[cell.file] = dict(record.get("machine", {}))
            self._results[cell.file] = stored(Result, record.get("result"), self._damaged(f"{cell.file}.json"))
        return self._results.get(cell.file)

    def test(self, cell: Cell) -> Test | None:
        """Return what a cell has measured on the test part; None if it was not tested."""
        name = f"{cell.file}.test.json"
        if cell.file not in self._tests and (record := self._read(name)) is not None:
            self._tests[cell.file] = stored(Test, record.get("test"), self._damaged(name))
        return self._tests.get(cell.file)

    def machine(self, cell: Cell) -> dict[str, Any]:
        """Return where and how fast a finished cell ran."""
        return self._machines.get(cell.file, {})

    def lock(self, cell: Cell) -> Lock | None:
        """Return the lock of a cell; None if another process holds it."""
        try:
            return Lock(self.folder / f"{cell.file}.lock", self.folder / cell.file)
        except BadInput:
            return None

    def finish(self, cell: Cell, result: Result, machine: Mapping[str, Any]) -> None:
        """Write a cell.

        Args:
            machine: Where and how fast it ran.
        """
        record = {"format": FORMAT, "name": cell.name, "key": cell.key, "result": asdict(result), "machine": machine}
        write_record(self.folder / f"{cell.file}.json", record)

    def finish_test(self, cell: Cell, test: Test) -> None:
        """Write the test of a cell."""
        record = {"format": FORMAT, "name": cell.name, "key": cell.key, "test": asdict(test)}
        write_record(self.folder / f"{cell.file}.test.json", record)

    def _read(self, name: str) -> dict[str, Any] | None:
        path = self.folder / name
        if not path.is_file():
            return None
        record = read_record(path, AGAIN)
        if record.get("format") != FORMAT:
            raise BadInput(f"{path} has format {record.get('format')}, not {FORMAT}: give --out another folder")
        return record

    def _damaged(self, name: str) -> str:
        return f"{self.folder / name} is damaged ({AGAIN})"
