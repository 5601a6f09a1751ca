"""Pages from the shards of a result: the frozen bytes of a block, read again whenever they are asked for.

Files stay open, so that one that is deleted or replaced meanwhile is still read as it was; one that is cut off or on a
disk that goes away ends in an error, where a memory map would kill the process.
"""

import errno
import os
import weakref
from collections.abc import Mapping, Sequence

from torch import Tensor

from qsvd.checkpoint.tensor_file import TensorEntry

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
