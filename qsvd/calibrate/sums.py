"""Sums over the calibration examples for every weight; they can be saved and continued without changing the result.

Shape suffixes: O = out features, I = in features.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor
from torch.nn import functional

from qsvd.calibrate.gradients import GradientSums
from qsvd.data.media import MediaRows
from qsvd.errors import BadInput, listing
from qsvd.files.statistics import LEFT, RIGHT, VALUES
from qsvd.plan.weights import WeightSpec

LOSS, EXAMPLES = "loss", "examples"
LEAST_OF_MEAN = 0.1  # an expert that saw few tokens counts at least so much of the mean over its stack


@dataclass
class Sums:
    """Sums over examples, float64 on the device, added in the order of the examples.

    Args:
        values: By name: MODULE.rows [O] and MODULE.columns [I], means of the squared gradient over a row and a column;
            MODULE.trace and MODULE.trace_squares [1], samples of the trace and their squares; loss, and examples. With
            `gradients`, the float32 singular vectors of the blocks that are done.
        gradients: None keeps none.
    """

    values: dict[str, Tensor]
    gradients: GradientSums | None = None

    @classmethod
    def empty(cls, weights: Sequence[WeightSpec], device: torch.device, *, has_traces: bool) -> "Sums":
        """Return the sums before the first example."""
        sizes = {f"{spec.module}.rows": spec.shape[0] for spec in weights}
        sizes |= {f"{spec.module}.columns": spec.shape[1] for spec in weights}
        if has_traces:
            sizes |= {f"{spec.module}.{part}": 1 for spec in weights for part in ("trace", "trace_squares")}
        sizes |= {LOSS: 1, EXAMPLES: 1}
        return cls({name: torch.zeros(size, dtype=torch.float64, device=device) for name, size in sizes.items()})

    def add_gradient(self, module: str, gradient_OI: Tensor) -> None:
        """Add the gradient of the loss of one example with respect to one weight."""
        squares_OI = gradient_OI.to(torch.promote_types(gradient_OI.dtype, torch.float32)).square()
        self.values[f"{module}.rows"] += squares_OI.sum(dim=1, dtype=torch.float64) / squares_OI.shape[1]
        self.values[f"{module}.columns"] += squares_OI.sum(dim=0, dtype=torch.float64) / squares_OI.shape[0]
        if self.gradients is not None:
            self.gradients.add(module, gradient_OI)

    def end_block(self, weights: Iterable[WeightSpec]) -> None:
        """Keep the singular vectors of the gradients of these weights, whose last example was added."""
        if self.gradients is not None:
            self.values |= self.gradients.close(weights, self.num_examples)

    def add_trace(self, module: str, sample: float) -> None:
        """Add v^T H v of one example and one probe, for one weight."""
        self.values[f"{module}.trace"] += sample
        self.values[f"{module}.trace_squares"] += sample**2

    def add_loss(self, loss: float) -> None:
        """Add the loss of one example."""
        self.values[LOSS] += loss
        self.values[EXAMPLES] += 1

    def check_finite(self) -> None:
        """Refuse sums of which nothing can be made.

        Raises:
            BadInput: a sum has a NaN or an infinity.
        """
        wrong = [name for name, value in self.values.items() if not value.isfinite().all()]
        if wrong:
            raise BadInput(
                f"{len(wrong)} sums of gradients are NaN or infinite ({listing(wrong)}): numbers overflow; give "
                "--dtype float32"
            )

    @property
    def num_examples(self) -> int:
        """Number of examples in the sums."""
        return int(self.values[EXAMPLES])

    @property
    def loss(self) -> float:
        """Mean loss over the examples, in nats."""
        return float(self.values[LOSS]) / self.num_examples


def means(sums: Sums, weights: Sequence[WeightSpec], probes: int) -> Mapping[str, Tensor]:
    """Return the tensors of a statistics file, float32 in CPU memory.

    The standard error of a trace treats all samples, of each probe and example, as independent; it is infinite for one
    sample. It includes the spread between examples, so for the trace over these examples it is too large rather than
    too small.
    """
    count = sums.num_examples
    found = {}
    for spec in weights:
        for part in ("rows", "columns"):
            found[f"{spec.module}.{part}"] = (sums.values[f"{spec.module}.{part}"] / count).float().cpu()
        if probes:
            trace, squares = (float(sums.values[f"{spec.module}.{part}"]) for part in ("trace", "trace_squares"))
            samples = count * probes
            mean = trace / samples
            spread = max(squares - samples * mean**2, 0.0)
            error = sqrt(spread / (samples - 1) / samples) if samples > 1 else float("inf")
            found[f"{spec.module}.trace"], found[f"{spec.module}.trace_error"] = torch.tensor([[mean], [error]])
    _raise_experts(found, weights)
    vectors = (f"{spec.module}.{part}" for spec in weights for part in (LEFT, VALUES, RIGHT))
    return found | {name: sums.values[name].cpu() for name in vectors if name in sums.values}


def _raise_experts(found: dict[str, Tensor], weights: Sequence[WeightSpec]) -> None:
    """Raise what was measured of experts with few tokens to LEAST_OF_MEAN of the mean over the stack."""
    stacks: dict[str, list[str]] = {}
    for spec in weights:
        if spec.stack:
            stacks.setdefault(spec.stack, []).append(spec.module)
    for modules in stacks.values():
        for part in ("rows", "columns"):
            names = [f"{module}.{part}" for module in modules]
            least = LEAST_OF_MEAN * torch.stack([found[name] for name in names]).mean(dim=0)
            found |= {name: torch.maximum(found[name], least) for name in names}


@dataclass(frozen=True)
class Example:
    """A text to calibrate on.

    Args:
        input_ids: [T].
        target: A label for each token, -100 without a loss (token t predicts label t + 1); or the class.
        segments: token_type_ids [T]; None is the model's default.
        images: Rows with images, and which of them the example is; None without images.
    """

    input_ids: Sequence[int]
    target: Sequence[int] | int
    segments: Sequence[int] | None = None
    images: tuple[MediaRows, int] | None = None

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        """Return the arguments of the model's forward: a batch of one, without padding and mask; images are opened."""
        if self.images is not None:
            rows, index = self.images
            batch = rows.batch([index])
            return {name: value.to(device) for name, value in batch.items() if name not in ("labels", "attention_mask")}
        inputs = {"input_ids": torch.tensor([list(self.input_ids)], device=device)}
        if self.segments is not None:
            inputs["token_type_ids"] = torch.tensor([list(self.segments)], device=device)
        return inputs

    def loss(self, logits: Tensor) -> Tensor:
        """Return the mean cross entropy of the trained tokens, or that of the class, in float32 or better.

        Args:
            logits: [1, T, V] of a language model, or [1, C] of a classifier.
        """
        exact = logits[0].to(torch.promote_types(logits.dtype, torch.float32))
        if isinstance(self.target, int):
            return functional.cross_entropy(exact, torch.tensor(self.target, device=exact.device))
        labels_T = torch.tensor(list(self.target), device=exact.device)
        return functional.cross_entropy(exact[:-1], labels_T[1:])  # ignores -100
