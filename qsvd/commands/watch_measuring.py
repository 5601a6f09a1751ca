"""What a person sees while candidates are measured, on stderr: a bar on a terminal, else a line every few percent."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

LINE_EVERY = 0.05  # of the numbers


@dataclass(frozen=True)
class Progressed:
    """How far a run is.

    elements, of total_elements, are the numbers of measured weights; new_elements those of this run alone.
    """

    weights: int
    num_weights: int
    elements: int
    new_elements: int
    total_elements: int

    def line(self, seconds: float) -> str:
        """The standing in words, after so many seconds of this run."""
        speed = self.new_elements / max(seconds, 1e-9)
        left = f"{(self.total_elements - self.elements) / speed:.0f} s left" if speed else "resumed"
        return f"{self.weights}/{self.num_weights} weights measured, {left}"


ShowProgress = Callable[[Progressed], None]


def watching_measuring() -> AbstractContextManager[ShowProgress]:
    """A way to show progress that suits stderr."""
    return _bar() if sys.stderr.isatty() else _lines()


@contextmanager
def _bar() -> Iterator[ShowProgress]:
    started = time.monotonic()
    with Progress(BarColumn(), TextColumn("{task.description}"), console=Console(stderr=True)) as progress:
        task = progress.add_task("reading", total=None)

        def show(done: Progressed) -> None:
            line = done.line(time.monotonic() - started)
            progress.update(task, total=done.total_elements, completed=done.elements, description=line)

        yield show


@contextmanager
def _lines() -> Iterator[ShowProgress]:
    started, shown = time.monotonic(), 0.0

    def show(done: Progressed) -> None:
        nonlocal shown
        share = done.elements / done.total_elements
        if share - shown >= LINE_EVERY or done.weights == done.num_weights:
            shown = share
            print(done.line(time.monotonic() - started), file=sys.stderr, flush=True)

    yield show
