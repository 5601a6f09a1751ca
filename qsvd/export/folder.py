"""The folder of one export: files appear whole, a killed run goes on, and nothing foreign is written over.

While it is not complete, FOLDER/unfinished/run.json says which export it is. qsvd_export.json is written last.
"""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from qsvd.errors import BadInput
from qsvd.files.atomic import write_text
from qsvd.files.output import LOCK, RUN, UNFINISHED, differences, to_json
from qsvd.files.safetensors import TORCH_DTYPES, NewTensor, read_object

RECORD = "qsvd_export.json"
FORMAT = 1
HEADER_BYTES = 250  # of the JSON of one tensor in a header and an index, at most
OTHER_BYTES = 10**6  # of configs and records, at most


class DiskTooSmall(ValueError):
    """An export needs more space than there is; nothing was written."""


class ExportFolder:
    """A folder, opened for one export; a `with` block lets it go again.

    Args:
        folder: Made if it is not there; empty, or left by an export with the same `identity`.
        identity: What the bytes depend on; JSON-able.
        num_bytes: What will be written in all.

    Raises:
        BadInput: the folder holds something else, or another export (the sentence says what differs), or another
            process is at work in it.
        DiskTooSmall: the files do not fit on the disk.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], num_bytes: int):
        self.folder = folder
        self.unfinished = folder / UNFINISHED
        self.identity = json.loads(json.dumps(identity))
        self.is_complete = (folder / RECORD).is_file()
        self._lock = FileLock(self.unfinished / LOCK)
        self._check_holder()
        if self.is_complete:
            shutil.rmtree(self.unfinished, ignore_errors=True)  # a kill may have left some of it
            return
        _check_space(folder, num_bytes)
        self.unfinished.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(blocking=False)
        except Timeout as error:
            raise BadInput(f"another export is at work in {folder}; wait for it, or stop it") from error
        write_text(self.unfinished / RUN, to_json(self.identity))

    def __enter__(self) -> "ExportFolder":
        return self

    def __exit__(self, *_: object) -> None:
        """Let another process work in the folder, and leave nothing if nothing was finished."""
        self._lock.release()
        if not self.is_complete and not _finished(self.folder):
            shutil.rmtree(self.unfinished)
            self.folder.rmdir()

    def close(self, result: Mapping[str, Any]) -> None:
        """Record the result and drop what only a resumed run needs."""
        record = {"format": FORMAT, "run": self.identity, "result": result}
        write_text(self.folder / RECORD, to_json(record))
        self._lock.release()
        shutil.rmtree(self.unfinished)

    def result(self) -> dict[str, Any]:
        """What `close` was given."""
        return read_object(self.folder / RECORD)["result"]

    def _check_holder(self) -> None:
        """Refuse a folder that is neither empty nor this export's."""
        for path in (self.folder / RECORD, self.unfinished / RUN):
            if path.is_file():
                found = read_object(path)
                self._check_same(found.get("run", {}) if path.name == RECORD else found)
                return
        if self.folder.exists() and any(path != self.unfinished for path in self.folder.iterdir()):
            raise BadInput(f"{self.folder} is not empty and not an export of qsvd; give another folder")

    def _check_same(self, found: Mapping[str, Any]) -> None:
        different = differences(found, self.identity)
        if different:
            raise BadInput(f"{self.folder} holds another export: {different}; give another folder")


def size_of(new: Sequence[NewTensor]) -> int:
    """Bytes of all tensors."""
    return sum(math.prod(tensor.shape) * TORCH_DTYPES[tensor.dtype].itemsize for tensor in new)


def disk_bytes(new: Sequence[NewTensor]) -> int:
    """Bytes of a file with these tensors and of small files beside it, at most."""
    return size_of(new) + HEADER_BYTES * len(new) + OTHER_BYTES


def _finished(folder: Path) -> list[Path]:
    """Every file that is more than the mark of an export."""
    marks = (folder / UNFINISHED / RUN, folder / UNFINISHED / LOCK)
    return [path for path in folder.rglob("*") if path.is_file() and path not in marks]


def _check_space(folder: Path, num_bytes: int) -> None:
    """Refuse what the disk cannot hold; what an earlier run wrote counts."""
    place = folder.absolute()
    written = sum(file.stat().st_size for file in place.rglob("*") if file.is_file()) if place.is_dir() else 0
    while not place.exists():
        place = place.parent
    needed, free = num_bytes - written, shutil.disk_usage(place).free
    if needed > free:
        raise DiskTooSmall(
            f"{folder} needs {needed / 1e9:.2f} GB more disk space ({place} has {free / 1e9:.2f} GB free); "
            "free some, or give a folder on another disk"
        )
