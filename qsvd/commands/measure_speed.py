"""What the card here does in a second, for estimates: products in 16 bits, and copies from pinned host memory."""

import statistics
import time
from collections.abc import Callable

import torch

SIDE = 8192  # of the matrices that are multiplied
COPIED = 1 << 28  # bytes
REPEATS = 5


def measured_flops() -> float:
    """Products and sums a second of square bfloat16 matrices."""
    left, right = (torch.randn(SIDE, SIDE, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 2 * SIDE**3 / _median(lambda: left @ right)


def measured_link() -> float:
    """Bytes a second from pinned host memory to the card."""
    source, target = torch.empty(COPIED, dtype=torch.uint8).pin_memory(), torch.empty(COPIED, dtype=torch.uint8).cuda()
    return COPIED / _median(lambda: target.copy_(source, non_blocking=True))


def _median(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(REPEATS + 1):
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])
