"""Where the pages of paging.py live: in the shards on disk, or in one arena of host memory."""

import mmap
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qsvd.checkpoint.page_reader import PageReader


class Arena:
    """A piece of host memory of our own, uint8, that CUDA may copy from directly.

    torch's pinned allocator rounds every piece up to a power of two (pytorch#95823): 36 GB would take 64.

    Args:
        pin: Ask CUDA to register it. `pinned` says whether that was possible: WSL2, ulimit -l and containers allow
            little or none.

    Raises:
        MemoryError: there is no such piece of memory.
    """

    def __init__(self, num_bytes: int, *, pin: bool):
        try:
            memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"the host has no {num_bytes / 1e9:.2f} GB of memory in one piece") from error
        self.bytes = torch.frombuffer(memory, dtype=torch.uint8)  # keeps the memory alive
        self.pinned = pin and _is_registered(self.bytes)

    def __del__(self) -> None:
        if getattr(self, "pinned", False):
            torch.cuda.synchronize()  # a copy may read it still
            _cudart().cudaHostUnregister(self.bytes.data_ptr())


class Store(ABC):
    """Pages by number."""

    sizes: Sequence[int]  # bytes of each

    @property
    @abstractmethod
    def place(self) -> str:
        """In words."""

    @abstractmethod
    def read_into(self, page: int, out: Tensor) -> None:
        """Fill `out`, uint8 on the host and at least as long as the page; an OSError where that cannot be done."""


class DiskStore(Store):
    """The shards themselves."""

    def __init__(self, reader: PageReader, sizes: Sequence[int]):
        self.sizes = sizes
        self._reader = reader

    @property
    def place(self) -> str:
        return "disk"

    def read_into(self, page: int, out: Tensor) -> None:
        self._reader.read_into(page, out)


class HostStore(Store):
    """One arena, filled straight from the shards.

    Args:
        pin: For copies that run beside the computation of a GPU; `pinned` says whether the system allowed it.

    Raises:
        MemoryError: as Arena; nothing was read.
    """

    def __init__(self, reader: PageReader, sizes: Sequence[int], *, pin: bool):
        self.sizes = sizes
        self._arena = Arena(sum(sizes), pin=pin)
        self._starts = [sum(sizes[:page]) for page in range(len(sizes))]
        for page in range(len(sizes)):
            reader.read_into(page, self.view(page))

    @property
    def pinned(self) -> bool:
        """Whether a GPU copies from it directly."""
        return self._arena.pinned

    @property
    def place(self) -> str:
        return "pinned host memory" if self.pinned else "host memory"

    def view(self, page: int) -> Tensor:
        """The page where it lies."""
        return self._arena.bytes[self._starts[page] : self._starts[page] + self.sizes[page]]

    def read_into(self, page: int, out: Tensor) -> None:
        out[: self.sizes[page]].copy_(self.view(page))


def _cudart() -> Any:
    return torch.cuda.cudart()


def _is_registered(memory: Tensor) -> bool:
    """Ask CUDA to take the memory. Where it does not, its note of that is cleared, or the next kernel would fail."""
    if int(_cudart().cudaHostRegister(memory.data_ptr(), len(memory), 0)) == 0:
        return True
    try:
        torch.zeros(1, device="cuda").add_(1)
    except RuntimeError:
        return False
    return False
