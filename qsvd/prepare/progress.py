"""How far a run is, for whoever shows it."""

from collections.abc import Callable
from dataclasses import dataclass


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
        seconds: Time of the new work; None is the time since the display began.
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

    def line(self, seconds: float) -> str:
        """Return the progress as one line, given the seconds since the display began."""
        speed = self.new / max(seconds if self.seconds is None else self.seconds, 1e-9)
        parts = [self.what]
        if self.rate is not None:
            unit, size = self.rate
            parts.append(f"{speed / size:,.0f} {unit}")
        parts.append(f"{(self.total - self.done) / speed:.0f} s left" if speed else "resumed")
        return ", ".join([*parts, *filter(None, [self.more])])


ShowProgress = Callable[[Progress], None]


def show_nothing(progress: Progress) -> None:
    """Show nothing: for callers from Python."""
    del progress
