"""One text to calibrate on, and what the model loses on it.

Shape suffixes: T = tokens, V = vocabulary, C = classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


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
