"""Peaks of resident memory, of work in a fork of this process, which has imported everything."""

import ctypes
import gc
import json
from pathlib import Path

import torch

from tests.stops import FORK

RESET_PEAK = "5"  # man proc_pid_clear_refs
MMAP_THRESHOLD = -3  # malloc.h
BIG = 2**20
IS_MAPPED = 2  # bit of the size in front of what malloc returns


def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def take_holes(libc, size=BIG):
    """Take the free pieces between those in use, so that each tensor of `size` bytes has a mapping of its own."""
    libc.malloc.restype = ctypes.c_size_t
    while not ctypes.c_size_t.from_address(libc.malloc(ctypes.c_size_t(size)) - 8).value & IS_MAPPED:
        pass


def grown(work, folder):
    """How many bytes more than at first the fork has had, at each `yield` of the work but the first.

    Args:
        work: A generator function; until its first `yield` it warms up. Free memory is given back there.
        folder: Gets a file with the numbers.
    """
    said = folder / "peaks.json"

    def forked():
        torch.set_num_threads(1)
        libc = ctypes.CDLL(None)
        libc.mallopt(MMAP_THRESHOLD, BIG)  # memory of freed tensors is given back at once, whatever came before
        steps = work()
        next(steps)
        gc.collect()
        libc.malloc_trim(0)
        take_holes(libc)
        Path("/proc/self/clear_refs").write_text(RESET_PEAK)
        before = peak()
        said.write_text(json.dumps([peak() - before for _ in steps]))

    process = FORK.Process(target=forked)
    process.start()
    process.join(timeout=600)
    assert process.exitcode == 0
    return json.loads(said.read_text())
