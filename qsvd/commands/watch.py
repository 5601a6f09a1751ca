"""What a person sees while a command runs, on stderr: a bar on a terminal, else a line every few percent."""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

LINE_EVERY = 0.05  # of the work


class Shown(Protocol):
    """How far a run is, whatever it does."""

    @property
    def share(self) -> float:
        """Of the work, 0 to 1."""
        ...

    @property
    def is_end(self) -> bool:
        """Whether there is no more to come."""
        ...

    def line(self, seconds: float) -> str:
        """In words, after so many seconds of this run."""
        ...


@dataclass(frozen=True)
class Standing:
    """How far `qsvd quantize` is.

    num_bytes, of total_bytes, are the source bytes of finished weights; new_bytes those of this run alone.
    reduction is of the Frobenius error so far, in percent.
    """

    weights: int
    num_weights: int
    num_bytes: int
    new_bytes: int
    total_bytes: int
    reduction: float

    @property
    def share(self) -> float:
        return self.num_bytes / self.total_bytes

    @property
    def is_end(self) -> bool:
        return self.weights == self.num_weights

    def line(self, seconds: float) -> str:
        speed = self.new_bytes / max(seconds, 1e-9)
        left = f"{(self.total_bytes - self.num_bytes) / speed:.0f} s left" if speed else "resumed"
        error = f"error {0 - self.reduction:+.1f} %"  # 0 - x, since -0.0 prints a sign
        return f"{self.weights}/{self.num_weights} weights, {speed / 1e6:.0f} MB/s, {left}, {error}"


Show = Callable[[Shown], None]


def watching() -> AbstractContextManager[Show]:
    """A way to show progress that suits stderr."""
    return _bar() if sys.stderr.isatty() else _lines()


@contextmanager
def _bar() -> Iterator[Show]:
    started = time.monotonic()
    with Progress(BarColumn(), TextColumn("{task.description}"), console=Console(stderr=True)) as progress:
        task = progress.add_task("reading", total=1.0)

        def show(standing: Shown) -> None:
            line = standing.line(time.monotonic() - started)
            progress.update(task, completed=standing.share, description=line)

        yield show


@contextmanager
def _lines() -> Iterator[Show]:
    started, shown = time.monotonic(), 0.0

    def show(standing: Shown) -> None:
        nonlocal shown
        if standing.share - shown >= LINE_EVERY or standing.is_end:
            shown = standing.share
            print(standing.line(time.monotonic() - started), file=sys.stderr, flush=True)

    yield show


class StopRequest:
    """The first Ctrl-C (or SIGTERM) is a request that the loop asks for; the second one stops at once."""

    def __init__(self, unit: str) -> None:
        self.made = False
        self._unit = unit  # "weight": what is finished before the stop

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        if self.made:
            raise KeyboardInterrupt
        self.made = True
        print(f"stopping after this {self._unit}; once more to stop at once", file=sys.stderr, flush=True)
