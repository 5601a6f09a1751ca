"""What a person sees while `qsvd calibrate` runs, on stderr: a bar on a terminal, else a line every few percent."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

LINE_EVERY = 0.05  # of the work


@dataclass(frozen=True)
class Position:
    """How far a run is.

    Args:
        examples: That are in the sums and kept; of `num_examples`.
        share: Of the work that is done, 0 to 1, blocks of the present examples counted.
        new_share: Of the work that this run has done.
        loss: Mean over the examples so far; None before the first.
        is_kept: Whether a stop now would lose nothing.
    """

    examples: int
    num_examples: int
    share: float
    new_share: float
    loss: float | None
    is_kept: bool

    def line(self, seconds: float) -> str:
        """The position in words, after so many seconds of this run."""
        left = f"{seconds * (1 - self.share) / self.new_share:.0f} s left" if self.new_share else "resumed"
        loss = "" if self.loss is None else f", loss {self.loss:.4f}"
        return f"{100 * self.share:.0f} %, {self.examples}/{self.num_examples} examples kept, {left}{loss}"


Show = Callable[[Position], None]


def watching_calibration() -> AbstractContextManager[Show]:
    """A way to show progress that suits stderr."""
    return _bar() if sys.stderr.isatty() else _lines()


@contextmanager
def _bar() -> Iterator[Show]:
    started = time.monotonic()
    with Progress(BarColumn(), TextColumn("{task.description}"), console=Console(stderr=True)) as progress:
        task = progress.add_task("reading", total=1.0)

        def show(position: Position) -> None:
            line = position.line(time.monotonic() - started)
            progress.update(task, completed=position.share, description=line)

        yield show


@contextmanager
def _lines() -> Iterator[Show]:
    started, shown = time.monotonic(), 0.0

    def show(position: Position) -> None:
        nonlocal shown
        is_end = position.examples == position.num_examples
        if position.share - shown >= LINE_EVERY or is_end:
            shown = position.share
            print(position.line(time.monotonic() - started), file=sys.stderr, flush=True)

    yield show
