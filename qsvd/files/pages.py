"""Offloaded weights: reading their pages from disk, and the CPU memory that is free for them."""

import ctypes
import errno
import os
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import psutil
from torch import Tensor

from qsvd.files.safetensors import READERS, TensorEntry

Page = Mapping[int, TensorEntry | bytes]  # parts in a file, or in memory, by their offset in the page
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
PLENTY = 1 << 30  # bytes that are free
ROOT = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


class PageReader:
    """The shards of a quantized model, opened to read pages: the frozen bytes of one block each.

    The files stay open, so that one that is deleted or replaced is still read as it was. A file that is truncated, or
    whose disk is removed, ends in an error; a memory map would kill the process.
    """

    def __init__(self, pages: Sequence[Page]):
        self._pages = pages
        files = {piece.file for page in pages for piece in page.values() if isinstance(piece, TensorEntry)}
        self._files = {file: os.open(file, os.O_RDONLY) for file in sorted(files)}
        for opened in self._files.values():
            weakref.finalize(self, os.close, opened)

    def read_into(self, number: int, out: Tensor) -> None:
        """Read page `number` into `out`, uint8 in CPU memory and at least as long as the page.

        Raises:
            OSError: a file ends too early or can no longer be read.
        """
        view = out.numpy().data
        for offset, piece in self._pages[number].items():
            if isinstance(piece, bytes):
                view[offset : offset + len(piece)] = piece
            else:
                self._read(piece, view[offset : offset + piece.num_bytes])

    def read_all(self, outs: Sequence[Tensor]) -> None:
        """Read the first pages into tensors, several at a time; raise what `read_into` raises."""
        threads = ThreadPoolExecutor(READERS, "read pages")
        try:
            for _ in threads.map(self.read_into, range(len(outs)), outs):
                pass
        finally:
            threads.shutdown(cancel_futures=True)

    def _read(self, entry: TensorEntry, view: memoryview) -> None:
        done = 0
        while done < entry.num_bytes:  # one call reads 2 GiB at most
            try:
                count = os.preadv(self._files[entry.file], [view[done:]], entry.start + done)
            except OSError as error:
                reason = f"can no longer be read ({error.strerror}); restore it"
                raise OSError(error.errno, reason, str(entry.file)) from error
            if not count:
                reason = f"was truncated during the run and ends inside {entry.name}; restore it"
                raise OSError(errno.EIO, reason, str(entry.file))
            done += count


def free_host_memory() -> int:
    """Return the bytes that this process can still use: those of the system, or those below its cgroup's limit."""
    return min(psutil.virtual_memory().available, *(_left(group) for group in _groups()), 2**63)


def taken_host_memory() -> int:
    """Return the resident bytes of this process."""
    return psutil.Process().memory_info().rss


def trim_freed_memory() -> None:
    """Tell glibc to return every large block that is freed to the system; for the time when a model is made.

    By default glibc raises the size from which it does so with every freed block, up to 32 MB. The blocks that a model
    allocates and frees before its weights are loaded would then leave gaps of some GB.
    """
    _set_malloc(mapped=1 << 20, trimmed=1 << 20)


def keep_freed_memory() -> None:
    """Tell glibc to keep freed blocks up to its usual sizes, if much memory is free; for the time of training.

    Parts of weights are decoded and freed all the time. Asking the system for each costs a third of a CPU's speed.
    """
    if free_host_memory() >= PLENTY:
        _set_malloc(mapped=1 << 25, trimmed=1 << 26)


def _set_malloc(*, mapped: int, trimmed: int) -> None:
    """Set the sizes, unless the user has set them or the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        mallopt(M_MMAP_THRESHOLD, mapped)
        mallopt(M_TRIM_THRESHOLD, trimmed)


def _groups() -> list[Path]:
    """Return the control groups that may limit the memory of this process: its own and their parents."""
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
    """Return limit less usage. The cache of files on disk does not count as used: the system drops it when needed."""
    for limit, usage, cache, shared in (
        ("memory.max", "memory.current", "file", "shmem"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache", "total_shmem"),
    ):
        if (group / limit).is_file() and (text := (group / limit).read_text().strip()) != "max":
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            files = int(stat.get(cache, 0)) - int(stat.get(shared, 0))  # the cache includes files in memory (tmpfs)
            return max(int(text) - int((group / usage).read_text()) + files, 0)
    return 2**63
