"""What a person sees while `qsvd calibrate` runs."""

from dataclasses import dataclass


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
