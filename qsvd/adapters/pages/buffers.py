"""Buffers on the device for pages, and the ways to fill one while another page computes."""

import mmap
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from qsvd.files.readers import PageReader
from qsvd.memory.device import trim_freed_memory
from qsvd.memory.items import num_slots


class Arena:
    """A piece of CPU memory, uint8, from which a GPU can copy directly.

    torch's pinned allocator rounds every piece up to a power of two (pytorch#95823): 36 GB would take 64.

    Args:
        device: A GPU asks CUDA to pin the memory. `pinned` says whether CUDA did: WSL2, ulimit -l and containers
            allow little or none.

    Raises:
        MemoryError: the system has no such piece of memory.
    """

    def __init__(self, num_bytes: int, device: torch.device):
        try:
            memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"the system has no {num_bytes / 1e9:.2f} GB of CPU memory in one piece") from error
        self.bytes = torch.frombuffer(memory, dtype=torch.uint8)  # keeps the memory alive
        self._device = device
        self.pinned = device.type == "cuda" and _is_registered(self.bytes, device)

    def __del__(self) -> None:
        if getattr(self, "pinned", False):
            torch.cuda.synchronize(self._device)  # its copies may still read the memory
            _cudart().cudaHostUnregister(self.bytes.data_ptr())


def _cudart() -> Any:
    return torch.cuda.cudart()


def _is_registered(memory: Tensor, device: torch.device) -> bool:
    """Ask CUDA to pin the memory. A refusal leaves an error that the next kernel would raise, so one is run here."""
    if int(_cudart().cudaHostRegister(memory.data_ptr(), len(memory), 0)) == 0:
        return True
    try:
        torch.zeros(1, device=device).add_(1)
    except RuntimeError:
        return False
    return False


class Store(ABC):
    """Pages by number.

    Attributes:
        sizes: Bytes of each page.
    """

    sizes: Sequence[int]

    @abstractmethod
    def read_into(self, page: int, out: Tensor) -> None:
        """Fill `out`, uint8 in CPU memory and at least as long as the page.

        Raises:
            OSError: the page cannot be read.
        """


class DiskStore(Store):
    """The shards themselves."""

    def __init__(self, reader: PageReader, sizes: Sequence[int]):
        self.sizes = sizes
        self._reader = reader

    def read_into(self, page: int, out: Tensor) -> None:
        self._reader.read_into(page, out)


class HostStore(Store):
    """One arena in CPU memory, filled from the shards.

    Args:
        device: Where the pages go; for a GPU the arena is pinned if the system allows it.

    Raises:
        MemoryError: as Arena; nothing was read.
    """

    def __init__(self, reader: PageReader, sizes: Sequence[int], device: torch.device):
        self.sizes = sizes
        self._arena = Arena(sum(sizes), device)
        self._starts = [sum(sizes[:page]) for page in range(len(sizes))]
        reader.read_all([self.view(page) for page in range(len(sizes))])

    @property
    def pinned(self) -> bool:
        """Whether a GPU can copy from it directly."""
        return self._arena.pinned

    def view(self, page: int) -> Tensor:
        """Return the page in the arena, without a copy."""
        return self._arena.bytes[self._starts[page] : self._starts[page] + self.sizes[page]]

    def read_into(self, page: int, out: Tensor) -> None:
        out[: self.sizes[page]].copy_(self.view(page))


class Slot(ABC):
    """One buffer and the page in it.

    Args:
        buffer: uint8 on the device, at least as long as the largest page.

    `page` is the page that the buffer holds or that is being fetched; None before the first one and after an error.
    """

    def __init__(self, buffer: Tensor):
        self.buffer = buffer
        self.page: int | None = None

    def prefetch(self, page: int) -> None:
        """Begin to fetch a page, after all queued work with the page before it."""
        self.page = None  # until _fetch returns: an interrupt inside it leaves unknown bytes
        self._fetch(page)
        self.page = page

    def wait(self) -> None:
        """Make all work that is queued from here on wait for the page.

        Raises:
            OSError: the page could not be read; the slot forgets it, so that it is fetched again.
        """
        page, self.page = self.page, None
        self._wait()
        self.page = page

    @abstractmethod
    def _fetch(self, page: int) -> None:
        """Begin to fetch."""

    @abstractmethod
    def _wait(self) -> None:
        """Wait for what _fetch began."""

    @abstractmethod
    def release(self) -> None:
        """Mark the end of the queued work with the page, behind which the buffer may be filled again."""


class HostSlot(Slot):
    """A buffer of a CPU, filled by a thread."""

    def __init__(self, buffer: Tensor, store: Store, reader: ThreadPoolExecutor):
        super().__init__(buffer)
        self._store, self._reader = store, reader
        self._reading: Future[None] | None = None

    def _fetch(self, page: int) -> None:
        self._reading = self._reader.submit(self._store.read_into, page, self.buffer)

    def _wait(self) -> None:
        assert self._reading is not None, "prefetch comes before wait"
        self._reading.result()

    def release(self) -> None:
        """Do nothing: a CPU has no queue, its work is done."""


class DeviceSlot(Slot):
    """A buffer of a GPU, filled by copies on their own stream.

    Two events order the streams: a computation waits for `_arrived`, and the next copy waits for `_released`.
    """

    def __init__(self, buffer: Tensor, stream: torch.cuda.Stream):
        super().__init__(buffer)
        buffer.record_stream(stream)  # torch gives the memory to nobody else while a copy may run, even without a model
        self._stream = stream
        self._arrived, self._released = torch.cuda.Event(), torch.cuda.Event()
        self.release()  # the first copy waits for the work of whoever had the memory before

    def _copy(self, page: Tensor) -> None:
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._released)
            self.buffer[: len(page)].copy_(page, non_blocking=True)
            self._arrived.record(self._stream)

    def _wait(self) -> None:
        torch.cuda.current_stream(self.buffer.device).wait_event(self._arrived)

    def release(self) -> None:
        self._released.record(torch.cuda.current_stream(self.buffer.device))


class PinnedSlot(DeviceSlot):
    """A buffer of a GPU, filled directly from pinned memory."""

    def __init__(self, buffer: Tensor, store: HostStore, stream: torch.cuda.Stream):
        super().__init__(buffer, stream)
        self._store = store

    def _fetch(self, page: int) -> None:
        self._copy(self._store.view(page))


class RingSlot(DeviceSlot):
    """A buffer of a GPU, filled from anywhere: a thread reads into a small pinned arena and queues the copy."""

    def __init__(self, buffer: Tensor, store: Store, stream: torch.cuda.Stream, reader: ThreadPoolExecutor):
        super().__init__(buffer, stream)
        self._store, self._reader = store, reader
        self._staging = Arena(len(buffer), buffer.device)
        self._reading: Future[None] | None = None

    def _fetch(self, page: int) -> None:
        self._reading = self._reader.submit(self._read_and_copy, page)

    def _read_and_copy(self, page: int) -> None:
        self._arrived.synchronize()  # the copy of the page before may still read the arena
        self._store.read_into(page, self._staging.bytes)
        self._copy(self._staging.bytes[: self._store.sizes[page]])

    def _wait(self) -> None:
        assert self._reading is not None, "prefetch comes before wait"
        self._reading.result()  # only now the copy is queued and its event recorded
        super()._wait()


def make_slots(store: Store, device: torch.device) -> list[Slot]:
    """Return the slots for the pages of a store."""
    longest = max(store.sizes)
    buffers = [torch.empty(longest, dtype=torch.uint8, device=device) for _ in range(num_slots(len(store.sizes)))]
    if device.type == "cuda" and isinstance(store, HostStore) and store.pinned:
        stream = torch.cuda.Stream(device)
        return [PinnedSlot(buffer, store, stream) for buffer in buffers]
    reader = ThreadPoolExecutor(1, thread_name_prefix="pages")
    if device.type == "cpu":
        trim_freed_memory()  # offloading on a CPU means that memory is short
        return [HostSlot(buffer, store, reader) for buffer in buffers]
    stream = torch.cuda.Stream(device)
    return [RingSlot(buffer, store, stream, reader) for buffer in buffers]
