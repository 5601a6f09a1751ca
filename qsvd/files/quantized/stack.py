"""Tensors that wait in a file until they are needed, the last ones first, so that they take no memory."""

import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from tempfile import mkstemp

import torch
from torch import Tensor


class TensorStack:
    """Lists of tensors in a file without a name: the system removes it when the process ends, however it ends.

    Args:
        folder: Where the file is; it exists.
        most_bytes: That may be used there; the caller keeps to it.
    """

    def __init__(self, folder: Path, most_bytes: int):
        self.most_bytes = most_bytes
        self._file, name = mkstemp(dir=folder)
        os.unlink(name)
        weakref.finalize(self, os.close, self._file)
        self._lists: list[tuple[int, list[tuple[torch.Size, torch.dtype]]]] = []  # where each begins, and its tensors

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
