"""A place on the device for one page, and the ways in which a page gets there while another one computes."""

import mmap
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from qsvd.files.pages import PageReader, give_back_at_once
from qsvd.memory.items import num_slots

# Where the pages of paging.py live: in the shards on disk, or in one arena of host memory.


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


class Slot(ABC):
    """One place.

    Args:
        room: uint8 on the device, at least as long as the largest page.

    `page` is what it holds or fetches; None where nothing was asked for, or that failed.
    """

    def __init__(self, room: Tensor):
        self.room = room
        self.page: int | None = None

    def bring(self, page: int) -> None:
        """Begin to fetch a page; what still computes with the one before it comes first."""
        self.page = None
        self._fetch(page)
        self.page = page

    def wait(self) -> None:
        """Let what follows compute with the page; an OSError where it could not be read, and it is asked for again."""
        page, self.page = self.page, None
        self._wait()
        self.page = page

    @abstractmethod
    def _fetch(self, page: int) -> None:
        """Begin to fetch."""

    @abstractmethod
    def _wait(self) -> None:
        """Wait."""

    @abstractmethod
    def leave(self) -> None:
        """All that computes with the page, for now, has been asked for."""


class HostSlot(Slot):
    """On a CPU: a thread reads."""

    def __init__(self, room: Tensor, store: Store, reader: ThreadPoolExecutor):
        super().__init__(room)
        self._store, self._reader = store, reader
        self._reading: Future[None] | None = None

    def _fetch(self, page: int) -> None:
        self._reading = self._reader.submit(self._store.read_into, page, self.room)

    def _wait(self) -> None:
        assert self._reading is not None, "brought before"
        self._reading.result()

    def leave(self) -> None:
        """Nothing: what was asked for is done."""


class DeviceSlot(Slot):
    """On a GPU: copies on a stream of their own, and two events, for a page that has arrived and one that may go."""

    def __init__(self, room: Tensor, stream: torch.cuda.Stream):
        super().__init__(room)
        room.record_stream(stream)  # nobody gets this memory while a copy is under way, though the model is gone
        self._stream = stream
        self._arrived, self._left = torch.cuda.Event(), torch.cuda.Event()
        self.leave()  # by whoever had the memory before

    def _copy(self, page: Tensor) -> None:
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._left)
            self.room[: len(page)].copy_(page, non_blocking=True)
            self._arrived.record(self._stream)

    def _wait(self) -> None:
        torch.cuda.current_stream(self.room.device).wait_event(self._arrived)

    def leave(self) -> None:
        self._left.record(torch.cuda.current_stream(self.room.device))


class PinnedSlot(DeviceSlot):
    """From pinned memory, directly."""

    def __init__(self, room: Tensor, store: HostStore, stream: torch.cuda.Stream):
        super().__init__(room, stream)
        self._store = store

    def _fetch(self, page: int) -> None:
        self._copy(self._store.view(page))


class RingSlot(DeviceSlot):
    """From anywhere: a thread fills a small pinned place, and asks for the copy."""

    def __init__(self, room: Tensor, store: Store, stream: torch.cuda.Stream, reader: ThreadPoolExecutor):
        super().__init__(room, stream)
        self._store, self._reader = store, reader
        self._place = Arena(len(room), pin=True)
        self._reading: Future[None] | None = None

    def _fetch(self, page: int) -> None:
        self._reading = self._reader.submit(self._read_and_copy, page)

    def _read_and_copy(self, page: int) -> None:
        self._arrived.synchronize()  # the copy of the page before has read the place
        self._store.read_into(page, self._place.bytes)
        self._copy(self._place.bytes[: self._store.sizes[page]])

    def _wait(self) -> None:
        assert self._reading is not None, "brought before"
        self._reading.result()
        super()._wait()


def make_slots(store: Store, device: torch.device) -> list[Slot]:
    """The places for the pages of a store."""
    longest = max(store.sizes)
    rooms = [torch.empty(longest, dtype=torch.uint8, device=device) for _ in range(num_slots(len(store.sizes)))]
    if device.type == "cuda" and isinstance(store, HostStore) and store.pinned:
        stream = torch.cuda.Stream(device)
        return [PinnedSlot(room, store, stream) for room in rooms]
    reader = ThreadPoolExecutor(1, thread_name_prefix="pages")
    if device.type == "cpu":
        give_back_at_once()  # pages are for those who have too little
        return [HostSlot(room, store, reader) for room in rooms]
    stream = torch.cuda.Stream(device)
    return [RingSlot(room, store, stream, reader) for room in rooms]
