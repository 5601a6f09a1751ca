"""A place on the device for one page, and the ways in which a page gets there while another one computes."""

from abc import ABC, abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from qsvd.adapters.page_store import Arena, HostStore, Store
from qsvd.checkpoint.host_memory import give_back_at_once
from qsvd.plan.pages import num_slots


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
