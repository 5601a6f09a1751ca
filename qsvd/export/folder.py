"""The folder of one export. qsvd_export.json, its record, is written last."""

import math
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from qsvd.files.atomic import read_object, write_json
from qsvd.files.safetensors import TORCH_DTYPES, NewTensor
from qsvd.files.workspace import IDENTITY, LOCK, Workspace

FORMAT = 1
HEADER_BYTES = 250  # of the JSON of one tensor in a header and an index, at most
OTHER_BYTES = 10**6  # of configs and records, at most


class ExportFolder(Workspace):
    """The folder of one run of `qsvd export`; an export that has finished nothing leaves no folder."""

    record = "qsvd_export.json"
    command = "qsvd export"

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        marks = (self.unfinished / IDENTITY, self.unfinished / LOCK)
        if not any(path.is_file() and path not in marks for path in self.folder.rglob("*")):
            shutil.rmtree(self.unfinished)
            self.folder.rmdir()

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write the record, then remove what only a resumed run needs."""
        write_json(self.folder / self.record, {"format": FORMAT, "run": self.identity, "result": result})
        self.close()

    def result(self) -> dict[str, Any]:
        """Return what was given to `finish`."""
        return read_object(self.folder / self.record)["result"]


def size_of(new: Sequence[NewTensor]) -> int:
    """Return the bytes of all tensors."""
    return sum(math.prod(tensor.shape) * TORCH_DTYPES[tensor.dtype].itemsize for tensor in new)


def disk_bytes(new: Sequence[NewTensor]) -> int:
    """Return an upper bound on the bytes of a file with these tensors and of the small files next to it."""
    return size_of(new) + HEADER_BYTES * len(new) + OTHER_BYTES
