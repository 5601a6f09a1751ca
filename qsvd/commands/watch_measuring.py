"""What a person sees while candidates are measured."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progressed:
    """How far measuring is.

    elements, of total_elements, are the numbers of measured weights; new_elements those of this run alone.
    """

    weights: int
    num_weights: int
    elements: int
    new_elements: int
    total_elements: int

    @property
    def share(self) -> float:
        return self.elements / self.total_elements

    @property
    def is_end(self) -> bool:
        return self.weights == self.num_weights

    def line(self, seconds: float) -> str:
        speed = self.new_elements / max(seconds, 1e-9)
        left = f"{(self.total_elements - self.elements) / speed:.0f} s left" if speed else "resumed"
        return f"{self.weights}/{self.num_weights} weights measured, {left}"


ShowProgress = Callable[[Progressed], None]
