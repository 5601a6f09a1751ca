"""Lines that a compiled library prints by itself, past Python: they would stand among what a command prints."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

STDOUT = 1  # its number, whatever sys.stdout is


@contextmanager
def silent_stdout() -> Iterator[None]:
    """Nothing reaches the process's stdout, neither from Python nor from C.

    HiGHS, as scipy 1.17 has it, prints a line for programmers whenever it mends an answer, even when told to be silent.
    """
    sys.stdout.flush()
    kept, nowhere = os.dup(STDOUT), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, STDOUT)
        yield
    finally:
        ctypes.CDLL(None).fflush(None)  # what C holds back would come out later
        os.dup2(kept, STDOUT)
        os.close(kept)
        os.close(nowhere)
