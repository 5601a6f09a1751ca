"""What a person sees while a command runs, on stderr: a bar on a terminal, else a line every few percent."""

import logging
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from qsvd.training.steps import Step

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


# What a person sees while `qsvd train` runs, on stderr: a bar on a terminal, else a line every few percent.


ShowStep = Callable[[Step], None]


def watching_steps(total: int, before: Step | None) -> AbstractContextManager[ShowStep]:
    """A way to show progress that suits stderr.

    Args:
        total: Steps of the whole run.
        before: The last step of an earlier part of the run, if there is one.
    """
    return _step_bar(total, before) if sys.stderr.isatty() else _step_lines(total, before)


def line(step: Step, total: int, before: Step | None) -> str:
    """A step in words."""
    tokens, seconds, number = (before.tokens, before.seconds, before.number) if before else (0, 0.0, 0)
    elapsed = max(step.seconds - seconds, 1e-9)
    left = (total - step.number) * elapsed / max(step.number - number, 1)
    speed = (step.tokens - tokens) / elapsed
    peak = f"peak {step.peak_bytes / 1e9:.2f} GB"
    return f"step {step.number}/{total}, loss {step.loss:.4f}, {speed:,.0f} tokens/s, {left:.0f} s left, {peak}"


@contextmanager
def _step_bar(total: int, before: Step | None) -> Iterator[ShowStep]:
    with Progress(BarColumn(), TextColumn("{task.description}"), console=Console(stderr=True)) as progress:
        task = progress.add_task("first step", total=total, completed=before.number if before else 0)

        def show(step: Step) -> None:
            progress.update(task, completed=step.number, description=line(step, total, before))

        yield show


@contextmanager
def _step_lines(total: int, before: Step | None) -> Iterator[ShowStep]:
    shown = 0.0

    def show(step: Step) -> None:
        nonlocal shown
        if step.number / total - shown >= LINE_EVERY or step.number == total or shown == 0:
            shown = step.number / total
            print(line(step, total, before), file=sys.stderr, flush=True)

    yield show


# What a person sees while `qsvd calibrate` runs.


@dataclass(frozen=True)
class Position:
    """How far calibration is.

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

    @property
    def is_end(self) -> bool:
        return self.examples == self.num_examples

    def line(self, seconds: float) -> str:
        left = f"{seconds * (1 - self.share) / self.new_share:.0f} s left" if self.new_share else "resumed"
        loss = "" if self.loss is None else f", loss {self.loss:.4f}"
        return f"{100 * self.share:.0f} %, {self.examples}/{self.num_examples} examples kept, {left}{loss}"


# What a person sees while candidates are measured.


# The libraries without their bars and notes: what matters of them is said by us.


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing below an error from transformers, datasets, TRL and accelerate; no warning that paging needs a GPU."""
    import datasets
    from transformers.utils import logging as transformers_logging

    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    no_bars_before = datasets.are_progress_bars_disabled()
    others = [logging.getLogger(name) for name in ("trl", "accelerate")]
    levels = [logger.level for logger in others]
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for logger in others:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Paged optimizers are not supported on CPU", UserWarning)
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
        if not no_bars_before:
            datasets.enable_progress_bars()
        for logger, level in zip(others, levels, strict=True):
            logger.setLevel(level)


# Lines that a compiled library prints by itself, past Python: they would stand among what a command prints.
