"""What a person sees while `qsvd train` runs, on stderr: a bar on a terminal, else a line every few percent."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from qsvd.train.steps import Step

LINE_EVERY = 0.05  # of the steps

ShowStep = Callable[[Step], None]


def watching_steps(total: int, before: Step | None) -> AbstractContextManager[ShowStep]:
    """A way to show progress that suits stderr.

    Args:
        total: Steps of the whole run.
        before: The last step of an earlier part of the run, if there is one.
    """
    return _bar(total, before) if sys.stderr.isatty() else _lines(total, before)


def line(step: Step, total: int, before: Step | None) -> str:
    """A step in words."""
    tokens, seconds, number = (before.tokens, before.seconds, before.number) if before else (0, 0.0, 0)
    elapsed = max(step.seconds - seconds, 1e-9)
    left = (total - step.number) * elapsed / max(step.number - number, 1)
    speed = (step.tokens - tokens) / elapsed
    peak = f"peak {step.peak_bytes / 1e9:.2f} GB"
    return f"step {step.number}/{total}, loss {step.loss:.4f}, {speed:,.0f} tokens/s, {left:.0f} s left, {peak}"


@contextmanager
def _bar(total: int, before: Step | None) -> Iterator[ShowStep]:
    with Progress(BarColumn(), TextColumn("{task.description}"), console=Console(stderr=True)) as progress:
        task = progress.add_task("first step", total=total, completed=before.number if before else 0)

        def show(step: Step) -> None:
            progress.update(task, completed=step.number, description=line(step, total, before))

        yield show


@contextmanager
def _lines(total: int, before: Step | None) -> Iterator[ShowStep]:
    shown = 0.0

    def show(step: Step) -> None:
        nonlocal shown
        if step.number / total - shown >= LINE_EVERY or step.number == total or shown == 0:
            shown = step.number / total
            print(line(step, total, before), file=sys.stderr, flush=True)

    yield show
