"""Records without torch: norms, the error of one weight, how much of a model is split, how far a run is.

This file imports no torch, so that `qsvd report` starts at once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Role = Literal[
    "q", "k", "v", "o", "gate", "up", "down", "expert up", "expert down", "other", "embedding", "head"
]  # what a layer does in its block, or next to the blocks


@dataclass(frozen=True)
class Norms:
    """Norms of one error matrix, in the units of the weight.

    nuclear_error is the standard error of an estimated nuclear norm, and 0 if the norm is exact.
    """

    frobenius: float
    nuclear: float
    nuclear_error: float
    spectral: float


@dataclass(frozen=True)
class WeightError:
    """The error of one weight W [out, in]: `before` of codec(W) alone, `after` of the stored split.

    bits counts everything that is stored for the split, factors included, per element of W.
    weight_frobenius is ||W||_F; a Frobenius error over it is the relative error.
    """

    name: str
    role: str
    shape: tuple[int, int]
    rank: int
    bits: float
    iteration: int
    weight_frobenius: float
    before: Norms
    after: Norms


@dataclass(frozen=True)
class LeftTensors:
    """Tensors that are not split and differ only in their numbers, "model.layers.*.input_layernorm.weight".

    reason is why a linear layer of the blocks is not split, "" for all other tensors.
    """

    pattern: str
    count: int
    elements: int
    reason: str = ""

    @property
    def size(self) -> str:
        """Number of tensors and elements, and the reason, in words."""
        words = f"{self.count:,} {'tensor' if self.count == 1 else 'tensors'}, {self.elements:,} elements"
        return f"{words}: {self.reason}" if self.reason else words


@dataclass(frozen=True)
class Coverage:
    """How much of a model is split. Tied tensors count once; persistent buffers count."""

    weights: int
    elements_split: int
    elements: int
    left: tuple[LeftTensors, ...]  # largest first
    unknown: tuple[LeftTensors, ...] = ()  # of the checkpoint, not of the model: copied, and not in `elements`

    @property
    def share(self) -> float:
        """Split elements over all elements, 0 to 1."""
        return self.elements_split / self.elements


FAST = 10  # units a second, from which a speed is shown as a whole number


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Args:
        done: Finished work, in any unit.
        new: The part of it that this run did; the rest was done before the run was resumed.
        total: All work.
        what: Finished work in words, "3/12 weights".
        rate: Unit of the speed that is shown and its size in units of work, ("MB/s", 1e6); None shows no speed.
        more: What is shown after the time left.
        may_stop: Whether a stop at this point loses nothing.
        seconds: Time of the new work; None is that since the first progress that was shown.
    """

    done: float
    new: float
    total: float
    what: str
    rate: tuple[str, float] | None = None
    more: str = ""
    may_stop: bool = True
    seconds: float | None = None

    @property
    def share(self) -> float:
        """Return the finished share of the work, 0 to 1."""
        return self.done / self.total

    def line(self, seconds: float | None) -> str:
        """Return the progress as one line.

        Args:
            seconds: Time of the new work; None if it cannot tell the speed yet.
        """
        seconds = seconds if self.seconds is None else self.seconds
        if seconds is None:
            return ", ".join(filter(None, [self.what, self.more]))
        speed = self.new / max(seconds, 1e-9)
        parts = [self.what]
        if self.rate is not None:
            unit, size = self.rate
            parts.append(f"{speed / size:,.{int(0 < speed / size < FAST)}f} {unit}")
        parts.append(f"{(self.total - self.done) / speed:.0f} s left" if speed else "resumed")
        return ", ".join([*parts, *filter(None, [self.more])])


ShowProgress = Callable[[Progress], None]


def show_nothing(progress: Progress) -> None:
    """Show nothing: for callers from Python."""
    del progress
