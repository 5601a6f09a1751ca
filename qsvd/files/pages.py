"""Pages from the shards of a result: the frozen bytes of a block, read again whenever they are asked for.

Files stay open, so that one that is deleted or replaced meanwhile is still read as it was; one that is cut off or on a
disk that goes away ends in an error, where a memory map would kill the process.
"""

import ctypes
import errno
import os
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

import psutil
from torch import Tensor

from qsvd.files.safetensors import TensorEntry

Piece = TensorEntry | bytes  # in a file, or known already
Page = Mapping[int, Piece]  # by the offset in the page


class PageReader:
    """The shards of a result, open for reading.

    Args:
        pages: What each page consists of.
    """

    def __init__(self, pages: Sequence[Page]):
        self._pages = pages
        files = {piece.file for page in pages for piece in page.values() if isinstance(piece, TensorEntry)}
        self._files = {file: os.open(file, os.O_RDONLY) for file in sorted(files)}
        weakref.finalize(self, _close, tuple(self._files.values()))

    def read_into(self, number: int, out: Tensor) -> None:
        """Fill `out`, uint8 on the host and at least as long as the page.

        Raises:
            OSError: a file ends too early or cannot be read any more.
        """
        view = out.numpy().data
        for offset, piece in self._pages[number].items():
            if isinstance(piece, bytes):
                view[offset : offset + len(piece)] = piece
            else:
                self._read(piece, view[offset : offset + piece.num_bytes])

    def _read(self, entry: TensorEntry, view: memoryview) -> None:
        done = 0
        while done < entry.num_bytes:  # one call reads 2 GiB at most
            try:
                count = os.preadv(self._files[entry.file], [view[done:]], entry.start + done)
            except OSError as error:
                reason = f"cannot be read any more ({error.strerror}); put it back"
                raise OSError(error.errno, reason, str(entry.file)) from error
            if not count:
                reason = f"was cut off during the run and ends inside {entry.name}; put it back whole"
                raise OSError(errno.EIO, reason, str(entry.file))
            done += count


def _close(files: Sequence[int]) -> None:
    for file in files:
        os.close(file)


# How much memory the host has left for this process, and how to take no more of it than is used.


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
PLENTY = 1 << 30  # bytes that are free
ROOT = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


def free_host_memory() -> int:
    """Bytes that can still be taken: what the system has, or what a limit on this process leaves if that is less."""
    return min(psutil.virtual_memory().available, *(_left(group) for group in _groups()), 2**63)


def taken_host_memory() -> int:
    """Bytes that this process has already: Python, its libraries, what they hold."""
    return psutil.Process().memory_info().rss


def trim_freed_memory() -> None:
    """Tell glibc to keep no large piece of memory that is free, while a model is made.

    By default it raises the size from which it gives pieces back with every piece that is freed, to 32 MB: what models
    make and drop before they are filled then leaves holes of some GB, which later work fills here and there.
    """
    _set_malloc(mapped=1 << 20, trimmed=1 << 20)


def keep_for_reuse() -> None:
    """Tell glibc to keep what is free, up to its usual sizes, if the host has plenty.

    Bands of weights come and go all the time: to ask the system for each takes a third of a CPU's speed.
    """
    if free_host_memory() >= PLENTY:
        _set_malloc(mapped=1 << 25, trimmed=1 << 26)


def _set_malloc(*, mapped: int, trimmed: int) -> None:
    """Nothing where the user has chosen sizes, or where the C library is another one."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        mallopt(M_MMAP_THRESHOLD, mapped)
        mallopt(M_TRIM_THRESHOLD, trimmed)


def _groups() -> list[Path]:
    """The control groups that may limit this process's memory, its own and those around it."""
    lines = OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.is_file() else []
    folders = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):  # version 2 has one group for all controllers
            root = ROOT / controllers
            own = PurePosixPath(path.lstrip("/"))
            folders += [root / own, *(root / parent for parent in own.parents)]
    return folders


def _left(group: Path) -> int:
    """Limit less usage, where what is kept of files on disk does not count: it goes when memory is asked for."""
    for limit, usage, cache, shared in (
        ("memory.max", "memory.current", "file", "shmem"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache", "total_shmem"),
    ):
        if (group / limit).is_file() and (text := (group / limit).read_text().strip()) != "max":
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            files = int(stat.get(cache, 0)) - int(stat.get(shared, 0))  # the cache has those in memory (tmpfs) too
            return max(int(text) - int((group / usage).read_text()) + files, 0)
    return 2**63
