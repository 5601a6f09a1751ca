"""Files with tensors, read as a whole: pages of offloaded weights, tensors before they are asked for, digests."""

import errno
import logging
import os
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from qsvd.errors import BadInput, Damaged, listing
from qsvd.files.atomic import file_digest
from qsvd.files.safetensors import (
    CHUNK_BYTES,
    READERS,
    SafetensorsHeader,
    TensorEntry,
    new_digest,
    read_header,
    read_pieces,
    read_tensor,
)
from qsvd.files.source import Checkpoint
from qsvd.plan.weights import WeightSpec

AHEAD = 2**29  # bytes of tensors that are read and not yet used
Page = Mapping[int, TensorEntry | bytes]  # parts in a file, or in memory, by their offset in the page


class PageReader:
    """The shards of a quantized model, opened to read pages: the frozen bytes of one block each.

    The files stay open, so that one that is deleted or replaced is still read as it was. A file that is truncated, or
    whose disk is removed, ends in an error; a memory map would kill the process. Digests are compared when a part is
    read for the first time.
    """

    def __init__(self, pages: Sequence[Page]):
        self._pages = pages
        files = {piece.file for page in pages for piece in page.values() if isinstance(piece, TensorEntry)}
        self._files = {file: os.open(file, os.O_RDONLY) for file in sorted(files)}
        for opened in self._files.values():
            weakref.finalize(self, os.close, opened)
        self._checked: set[TensorEntry] = set()

    def read_into(self, number: int, out: Tensor) -> None:
        """Read page `number` into `out`, uint8 in CPU memory and at least as long as the page.

        Raises:
            OSError: a file ends too early or can no longer be read.
            Damaged: a part differs from its digest.
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
        done, digest = 0, None if entry in self._checked else new_digest()
        while done < entry.num_bytes:
            try:
                count = os.preadv(self._files[entry.file], [view[done : done + CHUNK_BYTES]], entry.start + done)
            except OSError as error:
                reason = f"can no longer be read ({error.strerror}); restore it"
                raise OSError(error.errno, reason, str(entry.file)) from error
            if not count:
                reason = f"was truncated during the run and ends inside {entry.name}; restore it"
                raise OSError(errno.EIO, reason, str(entry.file))
            if digest is not None:
                digest.update(view[done : done + count])
            done += count
        if digest is not None:
            entry.check(digest)
            self._checked.add(entry)


class ReadAhead:
    """Tensors that threads read before they are asked for, in the order of `entries`, at most `AHEAD` bytes of them.

    A call returns a tensor once. One that is not read yet, or not among the entries, is read by the caller.

    Args:
        pinned: Whether a GPU gets the tensors: it copies pinned memory at the speed of its link.
    """

    def __init__(self, entries: Iterable[TensorEntry], *, pinned: bool = False):
        self._left = deque(entries)
        self._pinned, self._bytes = pinned, 0
        self._found: dict[TensorEntry, Future[Tensor]] = {}
        self._threads = ThreadPoolExecutor(READERS, "read ahead")
        self._submit()

    def __enter__(self) -> "ReadAhead":
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._found.clear()
        if self._pinned:
            torch.accelerator.memory.empty_host_cache()

    def __call__(self, entry: TensorEntry) -> Tensor:
        """Return the tensor of an entry."""
        future = self._found.pop(entry, None)
        if future is None:
            return read_tensor(entry, pinned=self._pinned)
        self._bytes -= entry.num_bytes
        self._submit()
        return future.result()

    def _submit(self) -> None:
        while self._left and (not self._found or self._bytes + self._left[0].num_bytes <= AHEAD):
            entry = self._left.popleft()
            self._bytes += entry.num_bytes
            self._found[entry] = self._threads.submit(read_tensor, entry, pinned=self._pinned)


def content_digest(path: Path) -> str:
    """Return the digest of a file: of one with tensors that of its header, which has their digests."""
    return read_header(path, needs_digests=True).digest if path.suffix == ".safetensors" else file_digest(path)


def check_contents(folder: Path, digests: Mapping[str, str], writer: str, otherwise: str = "") -> None:
    """Refuse a folder that lacks one of these files, or has another one; of files with tensors the headers are read.

    Args:
        digests: By the places of the files in the folder.
        writer: The command that wrote the folder.
        otherwise: What else to do, for the sentence.

    Raises:
        Damaged: the sentence names the files.
    """
    if absent := [name for name in digests if not (folder / name).is_file()]:
        raise Damaged(f"{folder} lacks {listing(absent)}, which {writer} wrote; copy the folder again")
    if changed := [name for name, digest in digests.items() if content_digest(folder / name) != digest]:
        advice = f"copy the folder again{f', or {otherwise}' if otherwise else ''}"
        raise Damaged(f"{listing(changed)} in {folder} differ from what {writer} wrote; {advice}")


def check_tensors(path: Path) -> SafetensorsHeader:
    """Read a whole file piece by piece, several tensors at a time; return its header.

    Raises:
        BadInput: the file breaks the format.
        Damaged: a tensor or the header differs from its digest.
    """
    header = read_header(path)

    def read(entry: TensorEntry) -> None:
        buffer = memoryview(bytearray(min(CHUNK_BYTES, entry.num_bytes)))
        for _ in read_pieces(entry, lambda _: buffer):
            pass

    with ThreadPoolExecutor(READERS) as threads:
        for _ in threads.map(read, (entry for entry in header.tensors.values() if entry.digest)):
            pass
    return header


def is_whole(path: Path) -> bool:
    """Return whether a file that an earlier run finished is there and undamaged; a damaged one is named in the log."""
    if not path.is_file():
        return False
    try:
        check_tensors(path)
    except BadInput as error:
        logging.getLogger("qsvd").warning("%s; it is written again", str(error).partition(";")[0])
        return False
    return True


def stream(checkpoint: Checkpoint, stacks: Sequence[Sequence[WeightSpec]]) -> Iterator[list[Tensor]]:
    """Yield the weights of stacks in order; at most two stacks are in memory, the one yielded and the next one.

    The weights of a stack are read at the same time, a few at once.
    """
    with ThreadPoolExecutor(READERS) as readers:
        coming = [readers.submit(checkpoint.read_weight, spec) for stack in stacks[:1] for spec in stack]
        for number in range(len(stacks)):
            tensors = [weight.result() for weight in coming]
            after = stacks[number + 1 : number + 2]
            coming = [readers.submit(checkpoint.read_weight, spec) for stack in after for spec in stack]
            yield tensors
            del tensors
