"""Tensors that wait in a file until they are needed, the last ones first, so that they take no memory."""

import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from shutil import disk_usage
from tempfile import mkstemp

import torch
from torch import Tensor

from qsvd.errors import DoesNotFit


class TensorStack:
    """Lists of tensors in a file without a name: the system removes it when the process ends, however it ends.

    Args:
        folder: Where the file is; it exists.
        most_bytes: That the caller may use there without need.
    """

    def __init__(self, folder: Path, most_bytes: int):
        self.folder, self.most_bytes = folder, most_bytes
        self._file, name = mkstemp(dir=folder)
        os.unlink(name)
        weakref.finalize(self, os.close, self._file)
        self._lists: list[tuple[int, list[tuple[torch.Size, torch.dtype]]]] = []  # where each begins, and its tensors

    def check_room(self, num_bytes: int) -> None:
        """Refuse, by DoesNotFit, more bytes than the disk has."""
        free = disk_usage(self.folder).free
        if num_bytes > free:
            raise DoesNotFit(
                f"the inputs of blocks need {num_bytes / 1e9:.1f} GB of disk space in {self.folder}, and "
                f"{free / 1e9:.1f} GB are free; give fewer --examples, a smaller --max-length, or --out on another disk"
            )

    def __len__(self) -> int:
        """Return the number of lists."""
        return len(self._lists)

    def push(self, tensors: Sequence[Tensor]) -> None:
        """Write a list of tensors in CPU memory."""
        start = os.lseek(self._file, 0, os.SEEK_END)
        for tensor in tensors:
            left = _bytes(tensor.contiguous())
            while left:  # one call writes at most 2 GB
                left = left[os.write(self._file, left) :]
        self._lists.append((start, [(tensor.shape, tensor.dtype) for tensor in tensors]))

    def pop(self) -> list[Tensor]:
        """Read the last list, and shorten the file."""
        start, kinds = self._lists.pop()
        os.lseek(self._file, start, os.SEEK_SET)
        tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in kinds]
        for tensor in tensors:
            left = _bytes(tensor)
            while left:
                count = os.readv(self._file, [left])
                assert count, "the file has all that was written"
                left = left[count:]
        os.ftruncate(self._file, start)
        return tensors


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data
