"""The processes of one command, which torchrun starts: their number, and what they agree on.

Each process joins once. Until then, and where there is one process, it is rank 0 of 1 and agrees with itself. Values
are JSON, and go through the store that torchrun keeps for its processes. No wait here outlasts a signal, or a process
that failed: `fail` tells the others why and with which exit code, and they end with the same code.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from threading import Event
from typing import TYPE_CHECKING, Any, TypeVar

from qsvd.errors import BadInput, ElsewhereFailed, QsvdError

if TYPE_CHECKING:
    from torch.distributed import Store

T = TypeVar("T")
LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets for each process
PIECE = 2**20  # bytes of one value in the store, which takes 8 MB
PAUSE = 0.05  # seconds between two looks at the store
FAILURE, LEFT = "failure", "left"  # keys in the store


@dataclass
class _Group:
    """The processes that joined. `turn` counts what they have agreed on so far, which gives keys that match."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    store: "Store | None" = None
    turn: int = 0


_ALONE = _Group(0, 1, 0, 1)
_group, _joined = _ALONE, 0  # and how often this process has joined


def are_launched() -> bool:
    """Return whether torchrun has started this process as one of several."""
    return all(name in os.environ for name in LAUNCH) and os.environ["WORLD_SIZE"] not in ("", "1")


def join() -> None:
    """Join the other processes, if there are any; return when all of them are there.

    Raises:
        QsvdError: the store of torchrun does not answer.
    """
    global _group, _joined  # a process is one of a group as a whole
    if not are_launched() or _group.store is not None:
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # the store would warn of every process that has left
    from torch import distributed

    try:
        store, rank, size = next(iter(distributed.rendezvous("env://")))
    except (distributed.DistError, RuntimeError, ValueError) as error:
        raise QsvdError(f"this process cannot join the others of torchrun: {error}") from error
    local = int(os.environ["LOCAL_RANK"]), int(os.environ.get("LOCAL_WORLD_SIZE", size))
    _joined += 1
    _group = _Group(rank, size, *local, distributed.PrefixStore(f"qsvd {_joined}", store))
    barrier()


def check_alone(name: str) -> None:
    """Refuse, by BadInput, a function of the package that several processes call, each for itself."""
    if are_launched() and _group.store is None:
        raise BadInput(f"{name} works in one process: for several, start `torchrun ... -m {name.replace('.', ' ')}`")


def leave() -> None:
    """End what `join` began, after success: rank 0, which may keep the store, waits until all others are here."""
    if _group.store is None:
        return
    with _explained():
        _group.store.set(f"{LEFT}/{_group.rank}", "")
    if is_main():
        for rank in range(size()):
            _get(f"{LEFT}/{rank}")
    forget()


def end() -> None:
    """End what trainers began between the processes, before this one ends with success."""
    if are_launched():
        from torch import distributed

        if distributed.is_initialized():
            distributed.destroy_process_group()


def forget() -> None:
    """Be alone again."""
    global _group  # see `join`
    _group = _ALONE


def rank() -> int:
    """Return the number of this process, from 0."""
    return _group.rank


def size() -> int:
    """Return the number of processes."""
    return _group.size


def local_rank() -> int:
    """Return the number of this process among those of its machine, which is that of its GPU."""
    return _group.local_rank


def local_size() -> int:
    """Return the number of processes on this machine."""
    return _group.local_size


def is_main() -> bool:
    """Return whether this is rank 0, which alone prints and writes outputs."""
    return _group.rank == 0


def gather(value: Any) -> list[Any]:
    """Return the values of all processes by rank, JSON-able; waits for each.

    Raises:
        ElsewhereFailed: another process failed meanwhile.
    """
    if _group.store is None:
        return [json.loads(json.dumps(value))]
    turn = _next()
    with _explained():
        _group.store.set(f"{turn}/{_group.rank}", json.dumps(value))
    return [json.loads(_get(f"{turn}/{other}")) for other in range(_group.size)]


def gather_bytes(value: bytes) -> list[bytes]:
    """Return the bytes of all processes by rank, however many they are; wait as `gather` does."""
    lengths = gather(len(value))
    if _group.store is None:
        return [value]
    turn = _next()
    for number, start in enumerate(range(0, len(value), PIECE)):
        with _explained():
            _group.store.set(f"{turn}/{_group.rank}/{number}", value[start : start + PIECE])  # pyright: ignore  # bytes work, too
    counts = [-(-length // PIECE) for length in lengths]
    return [b"".join(_get(f"{turn}/{other}/{n}") for n in range(count)) for other, count in enumerate(counts)]


def barrier() -> None:
    """Return when all processes are here; raise what `gather` raises."""
    gather(None)


def from_main(make: Callable[[], T]) -> T:
    """Return what rank 0 makes, JSON-able; only rank 0 makes it. Raise what `gather` raises."""
    if _group.store is None:
        return make()
    turn = _next()
    if is_main():
        made = make()
        with _explained():
            _group.store.set(f"{turn}/0", json.dumps(made))
        return made
    return json.loads(_get(f"{turn}/0"))


def main_first(make: Callable[[], T]) -> T:
    """Return what every process makes for itself, the others after rank 0, which may download files or refuse."""
    if not is_main():
        from_main(lambda: None)
        return make()
    made = make()
    from_main(lambda: None)
    return made


def check() -> None:
    """Raise an ElsewhereFailed if another process has failed; return at once."""
    if _group.store is None:
        return
    with _explained():
        failed = _group.store.check([FAILURE])
        code = json.loads(_group.store.get(FAILURE))[1] if failed else 0
    if failed:
        raise ElsewhereFailed(code)


def wait_until(is_true: Callable[[], bool], seconds: float = inf) -> bool:
    """Return when something that other processes do is done; False after some seconds without it.

    Raises:
        ElsewhereFailed: another process failed meanwhile.
    """
    looks = 0
    while not is_true():
        if looks * PAUSE > seconds:
            return False
        check()
        Event().wait(PAUSE)
        looks += 1
    return True


def fail(sentence: str, code: int) -> tuple[bool, int]:
    """Tell the others that this process ends with an error.

    Returns:
        Whether this is the first one, whose sentence is printed; and the exit code of the first one.
    """
    if _group.store is None:
        return True, code
    mine = json.dumps([_group.rank, code, sentence])
    try:
        with _explained():
            first = _group.store.compare_set(FAILURE, "", mine)
    except QsvdError:  # torchrun is gone
        return is_main(), code
    return first.decode() == mine, json.loads(first)[1]


def _next() -> int:
    _group.turn += 1
    return _group.turn


def _get(key: str) -> bytes:
    store = _group.store
    assert store is not None, "there are others"

    def is_there() -> bool:
        with _explained():
            return store.check([key])

    wait_until(is_there)
    with _explained():
        return store.get(key)


@contextmanager
def _explained() -> Iterator[None]:
    """Turn an error of the store into a sentence."""
    from torch import distributed

    try:
        yield
    except (distributed.DistError, ConnectionError) as error:
        raise QsvdError("the connection to torchrun is lost; the same command goes on from what is kept") from error
