"""The order of copies and computations on a GPU, on a model of one: streams that run as late and as mixed as they may.

What a stream is asked for waits in its queue. At random moments a random stream does its next operation, if the mark
that it waits for was reached. Every computation looks at the bytes in the room when its turn comes.
"""

import contextlib
import itertools
import random
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import pytest
import torch

from qsvd.adapters.pages import buffers as page_buffers
from qsvd.adapters.pages import cache as page_cache
from qsvd.adapters.pages.buffers import HostSlot, HostStore, PinnedSlot, RingSlot, Store, make_slots
from qsvd.adapters.pages.cache import PageCache

COUNT = 7
BEFORE = 255  # in every byte of a room: of whoever had the memory before


@dataclass
class Mark:
    """A place in a queue that is reached or not."""

    reached: bool = False


class Stream:
    lock = threading.RLock()  # of all queues

    def __init__(self):
        self.queue = deque()

    def append(self, kind, what):
        with self.lock:
            self.queue.append((kind, what))

    def wait_event(self, event):
        if event.mark is not None:  # an event that was never recorded holds nobody up
            self.append("wait", event.mark)


class Gpu:
    """Two streams, and events of the kind that torch.cuda has."""

    def __init__(self, seed):
        self.computing, self.copying = Stream(), Stream()
        self.copied = 0  # bytes
        self._draws, self._mine = random.Random(seed), threading.local()

    @property
    def current(self):
        return getattr(self._mine, "stream", self.computing)

    @contextlib.contextmanager
    def stream(self, stream):
        before, self._mine.stream = self.current, stream
        yield
        self._mine.stream = before

    def event(self):
        return Event(self)

    def ask(self, operation):
        self.current.append("do", operation)

    def step(self, *streams):
        """One operation of a stream, these or all, that has one; whether there was any."""
        with Stream.lock:
            among = streams or (self.computing, self.copying)
            ready = [s for s in among if s.queue and (s.queue[0][0] != "wait" or s.queue[0][1].reached)]
            if not ready:
                assert streams or not any(s.queue for s in among), "each waits for the other"
                return False
            kind, what = self._draws.choice(ready).queue.popleft()
            if kind == "mark":
                what.reached = True
            elif kind == "do":
                what()
            return True

    def some(self):
        for _ in range(self._draws.choice([0, 0, 0, 1, 5])):
            self.step()

    def drain(self):
        while self.step():
            pass


class Event:
    def __init__(self, gpu):
        self._gpu, self.mark = gpu, None

    def record(self, stream):
        self.mark = Mark()
        stream.append("mark", self.mark)

    def synchronize(self):
        while self.mark is not None and not self.mark.reached:
            # another thread may do the last operation between the question and the step
            assert self._gpu.step() or self.mark.reached, "waits for what nobody does"


class Room:
    """Memory of the GPU, of which only a stream's operations see the bytes."""

    device = torch.device("cuda", 1)

    def __init__(self, gpu, num_bytes):
        self._gpu, self.bytes, self.users = gpu, torch.full((num_bytes,), BEFORE, dtype=torch.uint8), []

    def __len__(self):
        return len(self.bytes)

    def __getitem__(self, place):
        self._place = place
        return self

    def copy_(self, page, *, non_blocking):
        assert non_blocking, "or nothing would compute meanwhile"
        place = self.bytes[self._place]
        self._gpu.copied += len(page)
        self._gpu.ask(lambda: place.copy_(page))  # whatever is in the page by then

    def record_stream(self, stream):
        self.users.append(stream)


class Numbered(Store):
    """Pages that are their own number, in every byte. `failing` are read in vain, once each."""

    def __init__(self):
        self.sizes = [16 + number for number in range(COUNT)]
        self.failing = set()

    def view(self, page):
        return torch.full((self.sizes[page],), page, dtype=torch.uint8)

    def read_into(self, page, out):
        out[: self.sizes[page] // 2] = page
        if page in self.failing:
            self.failing.remove(page)
            raise OSError("a disk that was away")
        out[: self.sizes[page]] = page


@pytest.fixture
def make(monkeypatch):
    """A function from a seed and a kind of slot to a cache on a model of a GPU."""
    reader = ThreadPoolExecutor(1)

    def made(seed, kind):
        gpu, store = Gpu(seed), Numbered()
        monkeypatch.setattr(torch.cuda, "Event", gpu.event)
        monkeypatch.setattr(torch.cuda, "stream", gpu.stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: gpu.current)
        monkeypatch.setattr(page_buffers, "_is_registered", lambda *_: True)
        monkeypatch.setattr(page_buffers.Arena, "__del__", lambda _: None)
        rooms = [Room(gpu, max(store.sizes)) for _ in range(3)]
        found = []
        gpu.ask(lambda: found.extend(int(b) for room in rooms for b in room.bytes))  # computed before there were pages
        more = (store, gpu.copying, reader) if kind is RingSlot else (store, gpu.copying)
        slots = [kind(room, *more) for room in rooms]
        monkeypatch.setattr(page_cache, "make_slots", lambda *_: slots)
        return gpu, store, PageCache(store, torch.device("cuda")), found

    yield made
    reader.shutdown()


def compute(gpu, cache, page, seen, *, backward_follows=True):
    """Ask for two operations on a page, which note what it holds then."""
    for _ in range(2):
        room = cache.get(page, backward_follows=backward_follows)
        gpu.ask(partial(look, room, cache.store.sizes[page], page, seen))
        gpu.some()


def look(room, num_bytes, page, seen):
    seen.append((page, room.bytes[:num_bytes].unique().tolist()))


def check(seen):
    assert seen
    assert all(found == [page] for page, found in seen)


@pytest.mark.parametrize("kind", [PinnedSlot, RingSlot])
@pytest.mark.parametrize("seed", range(40))
def test_every_computation_finds_its_page(make, kind, seed):
    gpu, _, cache, before = make(seed, kind)
    seen = []
    for page in [*range(COUNT), *reversed(range(COUNT))] * 3:
        compute(gpu, cache, page, seen)
    draws = random.Random(seed)
    for _ in range(60):
        compute(gpu, cache, draws.randrange(COUNT), seen, backward_follows=draws.random() < 0.5)
    for slot in cache._slots:
        slot.wait()
    gpu.drain()
    check(seen)
    assert gpu.copied == cache.moved_bytes
    assert set(before) == {BEFORE}, "a page came while others had the memory"


@pytest.mark.parametrize("kind", [PinnedSlot, RingSlot])
def test_the_next_two_pages_arrive_while_one_computes(make, kind):
    gpu, _, cache, _ = make(0, kind)
    gpu.drain()
    cache.get(0, backward_follows=True)
    gpu.ask(lambda: pytest.fail("not yet"))
    for slot in cache._slots:
        slot.wait()  # until the thread has asked for its copies
    while gpu.step(gpu.copying):
        pass
    assert sorted(int(slot.buffer.bytes[0]) for slot in cache._slots) == [0, 1, 2]


@pytest.mark.parametrize("kind", [PinnedSlot, RingSlot])
def test_memory_is_not_given_to_others_while_a_copy_may_be_under_way(make, kind):
    gpu, _, cache, _ = make(0, kind)
    assert all(slot.buffer.users == [gpu.copying] for slot in cache._slots)


@pytest.mark.parametrize("seed", range(20))
def test_a_page_that_could_not_be_read_is_an_error_when_it_computes_and_is_read_again(make, seed):
    gpu, store, cache, _ = make(seed, RingSlot)
    seen = []
    for page in itertools.chain([0], random.Random(seed).choices(range(COUNT), k=30)):
        store.failing.add(page)
        with contextlib.suppress(OSError):  # it may have been there
            compute(gpu, cache, page, seen)
        store.failing.clear()
        compute(gpu, cache, page, seen)
    gpu.drain()
    check(seen)


@pytest.mark.parametrize("error", [OSError("a disk that was away"), KeyboardInterrupt()])
def test_after_an_error_the_same_page_is_read_again(error):
    store = Numbered()
    real, calls = store.read_into, []

    def failing(page, out):
        calls.append(page)
        if len(calls) == 1:
            raise error
        real(page, out)

    store.read_into = failing
    cache = PageCache(store, torch.device("cpu"))
    with pytest.raises(type(error)):
        cache.get(0, backward_follows=True)
    assert cache.get(0, backward_follows=True)[: store.sizes[0]].eq(0).all()
    assert calls.count(0) == 2


def test_an_interrupt_while_a_page_is_asked_for_leaves_no_wrong_bytes(monkeypatch):
    cache = PageCache(Numbered(), torch.device("cpu"))
    for page in range(3):
        cache.get(page, backward_follows=False)
    real, held = HostSlot._fetch, {slot.page for slot in cache._slots}

    def interrupted(slot, page):
        real(slot, page)
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(HostSlot, "_fetch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache.get(6, backward_follows=False)
    assert held - {slot.page for slot in cache._slots} == {3}, "whose place was taken"
    for page in (3, 6, 0, 1, 2):
        assert cache.get(page, backward_follows=False)[: cache.store.sizes[page]].eq(page).all()


def test_slots_are_of_the_kind_that_the_device_and_the_store_allow(monkeypatch):
    made = []
    monkeypatch.setattr(page_buffers, "trim_freed_memory", lambda: made.append("gives back"))
    slots = make_slots(Numbered(), torch.device("cpu"))
    assert [type(slot) for slot in slots] == [HostSlot] * 3
    assert made == ["gives back"]
    assert {len(slot.buffer) for slot in slots} == {16 + COUNT - 1}
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: Stream())
    monkeypatch.setattr(torch, "empty", lambda size, **_: Room(None, size))
    monkeypatch.setattr(torch.cuda, "Event", lambda: Event(None))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream())
    monkeypatch.setattr(page_buffers.Arena, "__del__", lambda _: None)
    for registered, kind in ((True, PinnedSlot), (False, RingSlot)):
        monkeypatch.setattr(page_buffers, "_is_registered", lambda *_, answer=registered: answer)
        host = HostStore.__new__(HostStore)
        host.sizes, host._arena = [8, 9], page_buffers.Arena(17, torch.device("cuda"))
        slots = make_slots(host, torch.device("cuda"))
        assert [type(slot) for slot in slots] == [kind] * 2
        assert len({id(slot._stream) for slot in slots}) == 1
        assert {type(slot) for slot in make_slots(Numbered(), torch.device("cuda"))} == {RingSlot}
    assert made == ["gives back"]


class Driver:
    """What of CUDA's runtime an arena calls; `answer` is cudaSuccess or an error."""

    def __init__(self, answer):
        self.answer, self.calls = answer, []

    def cudaHostRegister(self, address, num_bytes, flags):
        self.calls.append(("register", address, num_bytes, flags))
        return self.answer

    def cudaHostUnregister(self, address):
        self.calls.append(("unregister", address))
        return 0


GPU = torch.device("cuda", 1)  # not the current one


def arena(monkeypatch, answer, device):
    """The calls for an arena that was made and dropped, whether it was pinned, and its address."""
    driver = Driver(answer)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: driver.calls.append(("wait", device)))
    made = page_buffers.Arena(5000, device)
    pinned, address = made.pinned, made.bytes.data_ptr()
    assert len(made.bytes) == 5000
    del made
    return driver.calls, pinned, address


def test_pinned_memory_is_let_go_after_the_copies_that_read_it(monkeypatch):
    calls, pinned, address = arena(monkeypatch, 0, GPU)
    assert pinned
    assert calls == [("register", address, 5000, 0), ("wait", GPU), ("unregister", address)]


@pytest.mark.parametrize("told", [True, False])
def test_where_pinning_is_refused_the_note_of_it_is_cleared(monkeypatch, told):
    """CUDA tells of it at the next kernel, or at the call itself."""
    kernels = []

    def zeros(*_, device):
        kernels.append(device)
        if told:
            raise RuntimeError("CUDA error: out of memory")
        return torch.ones(1)

    monkeypatch.setattr(torch, "zeros", zeros)
    calls, pinned, address = arena(monkeypatch, 2, GPU)
    assert not pinned
    assert calls == [("register", address, 5000, 0)]
    assert kernels == [GPU]


def test_memory_that_is_not_to_be_pinned_asks_cuda_for_nothing(monkeypatch):
    calls, pinned, _ = arena(monkeypatch, 0, torch.device("cpu"))
    assert (calls, pinned) == ([], False)
