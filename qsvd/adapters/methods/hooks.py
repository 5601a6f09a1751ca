"""What a method does around the optimizer steps of a run."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


def _keeps_nothing(parameters: Iterable[nn.Parameter]) -> None:
    """Stand for an optimizer without state."""
    del parameters


@dataclass(frozen=True)
class Course:
    """What the hooks of a method know of a run.

    Args:
        steps: Optimizer steps.
        learning_rate: The highest one.
        forget: Lets the optimizer begin anew with parameters whose values a hook replaced.
    """

    steps: int
    learning_rate: float
    forget: Callable[[Iterable[nn.Parameter]], None] = _keeps_nothing


class Hooks:
    """What a method does around the optimizer steps of a run; one object a run.

    Each of the three functions is called once an optimizer step, counted from 1.

    Args:
        adapters: The trained adapters by the paths of their layers, in model order.
    """

    def __init__(self, adapters: Mapping[str, Any], course: Course):
        self.adapters, self.course = adapters, course

    def looked(self) -> list[Tensor]:
        """Return the sums over inputs that `look` has kept in this step, float32.

        Several processes add them up before `after_backward`; a method that looks at inputs and returns none is trained
        in one process only.
        """
        return []

    def after_backward(self, step: int) -> None:
        """Act on the gradients of all batches of the step, summed, before they are clipped."""

    def transform_grads(self, step: int) -> None:
        """Act on the gradients after they are clipped, right before the optimizer."""

    def after_step(self, step: int) -> None:
        """Act on the parameters after the optimizer moved them; the gradients are still there."""

    def end(self) -> None:
        """Act after the last step: other code may move the parameters from now on."""

    def state(self) -> dict[str, Tensor]:
        """Return what a stopped run needs to continue; it is saved with every checkpoint."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a saved state."""
