"""What is added up over the examples, for every weight: it can be put away, and the sum goes on to the same bytes.

Shape suffixes: O = out features, I = in features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor
from torch.nn import functional

from qsvd.plan.weights import WeightSpec

LOSS, EXAMPLES = "loss", "examples"


@dataclass
class Sums:
    """Sums over examples, float64 on the device; in the order of the examples, however many go together.

    Args:
        values: By name: MODULE.rows [O] and MODULE.columns [I], means of the squared gradient over a row and a column;
            MODULE.trace and MODULE.trace_squares [1], samples of the trace and their squares; loss, and examples.
    """

    values: dict[str, Tensor]

    @classmethod
    def empty(cls, weights: Sequence[WeightSpec], device: torch.device, *, has_traces: bool) -> "Sums":
        """Before the first example."""
        sizes = {f"{spec.module}.rows": spec.shape[0] for spec in weights}
        sizes |= {f"{spec.module}.columns": spec.shape[1] for spec in weights}
        if has_traces:
            sizes |= {f"{spec.module}.{part}": 1 for spec in weights for part in ("trace", "trace_squares")}
        sizes |= {LOSS: 1, EXAMPLES: 1}
        return cls({name: torch.zeros(size, dtype=torch.float64, device=device) for name, size in sizes.items()})

    def add_gradient(self, module: str, gradient_OI: Tensor) -> None:
        """Of the loss of one example in one weight."""
        squares_OI = gradient_OI.to(torch.promote_types(gradient_OI.dtype, torch.float32)).square()
        self.values[f"{module}.rows"] += squares_OI.sum(dim=1, dtype=torch.float64) / squares_OI.shape[1]
        self.values[f"{module}.columns"] += squares_OI.sum(dim=0, dtype=torch.float64) / squares_OI.shape[0]

    def add_trace(self, module: str, sample: float) -> None:
        """v^T H v of one example and one probe, in one weight."""
        self.values[f"{module}.trace"] += sample
        self.values[f"{module}.trace_squares"] += sample**2

    def add_loss(self, loss: float) -> None:
        """Of one example."""
        self.values[LOSS] += loss
        self.values[EXAMPLES] += 1

    @property
    def num_examples(self) -> int:
        """Examples that are in the sums."""
        return int(self.values[EXAMPLES])

    @property
    def loss(self) -> float:
        """Mean over the examples, in nats."""
        return float(self.values[LOSS]) / self.num_examples


def means(sums: Sums, weights: Sequence[WeightSpec], probes: int) -> Mapping[str, Tensor]:
    """The tensors of a file of statistics, float32 on the host.

    The standard error of a trace takes all samples, of each probe and each example, for independent ones. For the trace
    over these very examples it is too large rather than too small: it counts that examples differ.
    """
    count = sums.num_examples
    found = {}
    for spec in weights:
        for part in ("rows", "columns"):
            found[f"{spec.module}.{part}"] = (sums.values[f"{spec.module}.{part}"] / count).float().cpu()
        if probes:
            trace, squares = (float(sums.values[f"{spec.module}.{part}"]) for part in ("trace", "trace_squares"))
            mean, error = _mean_and_error(trace, squares, count * probes)
            found[f"{spec.module}.trace"], found[f"{spec.module}.trace_error"] = torch.tensor([[mean], [error]])
    return found


def _mean_and_error(total: float, squares: float, samples: int) -> tuple[float, float]:
    """The mean of the samples and its standard error, which is infinite for a single one."""
    mean = total / samples
    if samples < 2:
        return mean, float("inf")
    variance = max(squares - samples * mean**2, 0.0) / (samples - 1)
    return mean, sqrt(variance / samples)


# One text to calibrate on, and what the model loses on it.


@dataclass(frozen=True)
class Example:
    """Tokens, and what is to be predicted.

    Args:
        input_ids: [T].
        target: A label for each token, -100 where there is no loss (token t predicts label t + 1); or the class.
        segments: token_type_ids [T]; None is the model's default.
    """

    input_ids: Sequence[int]
    target: Sequence[int] | int
    segments: Sequence[int] | None = None

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        """Arguments of the model's forward, a batch of one: nothing is padded, so nothing is masked."""
        inputs = {"input_ids": torch.tensor([list(self.input_ids)], device=device)}
        if self.segments is not None:
            inputs["token_type_ids"] = torch.tensor([list(self.segments)], device=device)
        return inputs

    def loss(self, logits: Tensor) -> Tensor:
        """Mean cross entropy of the trained tokens, or that of the class; at least float32.

        Args:
            logits: [1, T, V] of a language model, or [1, C] of a classifier.
        """
        exact = logits[0].to(torch.promote_types(logits.dtype, torch.float32))
        if isinstance(self.target, int):
            return functional.cross_entropy(exact, torch.tensor(self.target, device=exact.device))
        labels_T = torch.tensor(list(self.target), device=exact.device)
        return functional.cross_entropy(exact[:-1], labels_T[1:])  # -100 is left out
