"""What a command shows on stderr while it runs: a bar on a terminal, else a line every few percent of the work."""

import logging
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.segment import Segment
from rich.text import Text

from qsvd import ranks
from qsvd.errors import Interrupted, visible
from qsvd.records import FAST, Progress, ShowProgress

LINE_EVERY = 0.05  # of the work


class _Terminal(Console):
    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else visible(text), style, control)

    def render_str(self, text: str, **how: Any) -> Text:
        return super().render_str(visible(text), **how)


def terminal(*, stderr: bool = False) -> Console:
    """Return a console that shows text as it is: a path may hold "[/b]", ":cat:" or escape sequences."""
    return _Terminal(stderr=stderr, markup=False, emoji=False)


def say(text: object = "", *, file: TextIO | None = None, flush: bool = False) -> None:
    """Print a text, `visible`; nothing else here, but `terminal`, prints."""
    print(visible(text), file=file, flush=flush)


@contextmanager
def display() -> Iterator[ShowProgress]:
    """Show progress in the form that suits stderr."""
    pace = _Pace()
    if not sys.stderr.isatty():
        yield _Lines(pace).show
        return
    with Bar(BarColumn(), TextColumn("{task.description}", markup=False), console=terminal(stderr=True)) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda now: bar.update(task, completed=now.share, description=pace.line(now))


class _Pace:
    """The speed from the first progress on: the time before it, in which a model is loaded, says nothing about it."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._first: Progress | None = None

    def line(self, now: Progress) -> str:
        """Return the progress as one line; the first one tells no speed, unless it is the last one too."""
        seconds = time.monotonic() - self._begun
        if self._first is None:
            self._first = now
            self._begun += 0 if now.done == now.total else seconds
            return now.line(seconds if now.new == 0 or now.done == now.total else None)
        return replace(now, new=now.new - self._first.new).line(seconds)


class _Lines:
    """A line at the first progress, at the second, at every LINE_EVERY of the work after it, and at the end."""

    def __init__(self, pace: _Pace) -> None:
        self._pace = pace
        self._next = 0.0  # share at which the next line is due
        self._shown = 0

    def show(self, now: Progress) -> None:
        if now.share >= self._next or now.done == now.total:
            self._shown += 1
            self._next = now.share + LINE_EVERY if self._shown > 1 else 0.0
            say(self._pace.line(now), file=sys.stderr, flush=True)


class Stopwatch:
    """Tells where the time of a run went: what it waited for, and the rest.

    Args:
        rest: What the run did in the rest of the time, "splitting and measuring".
    """

    def __init__(self, rest: str) -> None:
        self._begun = time.monotonic()
        self._waited: dict[str, float] = {}
        self._rest = rest

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Count the time of the block as waiting for this, "reading"."""
        begun = time.monotonic()
        yield
        self._waited[what] = self._waited.get(what, 0.0) + time.monotonic() - begun

    def line(self) -> str:
        """Return "Time: 73 s splitting and measuring, 12 s waiting for reading", the largest first."""
        parts = {f"waiting for {what}": seconds for what, seconds in self._waited.items()}
        parts |= {self._rest: time.monotonic() - self._begun - sum(self._waited.values())}
        largest_first = sorted(parts.items(), key=lambda part: -part[1])
        return f"Time: {', '.join(f'{seconds:.{int(seconds < FAST)}f} s {what}' for what, seconds in largest_first)}"


class StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a request that the loop asks for; the second one stops at once.

    Args:
        unit: What is finished before the stop, "weight".
        ends_at_once: Whether SIGTERM stops at once: torchrun sends it to the others when one process has died.
    """

    def __init__(self, unit: str, *, ends_at_once: bool = False) -> None:
        self.made = self.is_ended = False
        self._unit, self._ends_at_once = unit, ends_at_once

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            if not (self.is_ended and number == signal.SIGTERM):
                signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGTERM and ranks.size() > 1:  # sent by torchrun, maybe twice
            self.made, self.is_ended = True, self._ends_at_once
            if self.is_ended:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                raise KeyboardInterrupt
            return
        if self.made:
            self.__exit__()  # the next one is for whoever waited before
            raise KeyboardInterrupt
        self.made = True
        say(f"stopping after this {self._unit}; press Ctrl-C again to stop at once", file=sys.stderr, flush=True)


@contextmanager
def watched(unit: str, kept: str) -> Iterator[ShowProgress]:
    """Show progress, and stop where the user asks to.

    Args:
        unit: What is finished before the stop, "weight".
        kept: The sentence that says what a stopped run keeps.

    Raises:
        Interrupted: after Ctrl-C, from the function that shows progress; of several processes, after SIGTERM, at once.
    """
    with StopRequest(unit, ends_at_once=ranks.size() > 1) as stop, display() as show:

        def show_or_stop(now: Progress) -> None:
            show(now)
            ranks.check()
            if stop.made and now.may_stop:
                raise Interrupted(f"interrupted; {kept}")

        try:
            yield show_or_stop
        except KeyboardInterrupt:
            if stop.is_ended:
                raise Interrupted(f"ended by torchrun, as when one of the processes dies; {kept}") from None
            raise


@contextmanager
def explained_disk_errors(unfinished: Path, kept: str) -> Iterator[None]:
    """Add to an error of the disk what is kept, if the path of unfinished work is there."""
    try:
        yield
    except OSError as error:
        if not unfinished.exists():
            raise
        raise OSError(error.errno, f"{error.strerror or error}; {kept}", error.filename) from error


@contextmanager
def quiet(*, reads_data: bool = True) -> Iterator[None]:
    """Silence transformers, TRL and accelerate below errors, and the warning that paging needs a GPU.

    Args:
        reads_data: Whether to hide the progress bars of datasets, too; that imports it.
    """
    from transformers.utils import logging as transformers_logging

    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    others = [logging.getLogger(name) for name in ("trl", "accelerate")]
    levels = [logger.level for logger in others]
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for logger in others:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), _no_bars_of_datasets() if reads_data else nullcontext():
            warnings.filterwarnings("ignore", "Paged optimizers are not supported on CPU", UserWarning)
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
        for logger, level in zip(others, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _no_bars_of_datasets() -> Iterator[None]:
    import datasets

    was_disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not was_disabled:
            datasets.enable_progress_bars()
