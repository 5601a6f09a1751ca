"""Run `qsvd train` under torch.profiler, for tools/seventy, and print one line of JSON on the copies to the GPU."""

import json
import sys
from collections.abc import Iterable

import torch

from qsvd.cli import parse
from qsvd.commands.train import train

Span = tuple[float, float]  # begin and end, in microseconds


def main(arguments: list[str]) -> None:
    """Train, and measure the time of copies to the GPU and of kernels."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        train(parse(arguments))
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    copies = [event for event in events if "HtoD" in event.name and event.time_range.elapsed_us() > 1000]
    kernels = [event for event in events if "Mem" not in event.name]
    pages = merged((event.time_range.start, event.time_range.end) for event in copies)
    busy = merged((event.time_range.start, event.time_range.end) for event in kernels)
    copied = sum(end - begin for begin, end in pages)
    found = {
        "copy_seconds": copied / 1e6,
        "kernel_seconds": sum(end - begin for begin, end in busy) / 1e6,
        "hidden": common(pages, busy) / copied if copied else 1.0,
    }
    print(json.dumps(found))


def merged(spans: Iterable[Span]) -> list[Span]:
    """Return the union of the spans, as spans that do not overlap, in order."""
    found: list[Span] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((begin, end))
    return found


def common(left: list[Span], right: list[Span]) -> float:
    """Return the microseconds that are in both lists of spans; both come from `merged`."""
    total, place = 0.0, 0
    for begin, end in left:
        while place < len(right) and right[place][1] <= begin:
            place += 1
        at = place
        while at < len(right) and right[at][0] < end:
            total += min(end, right[at][1]) - max(begin, right[at][0])
            at += 1
    return total


if __name__ == "__main__":
    main(sys.argv[1:])
