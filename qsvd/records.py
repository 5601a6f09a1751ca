"""The records that reports are made of: norms, the error of one weight, how much of a model is split.

This file imports no torch, so that `qsvd report` starts at once.
"""

from dataclasses import dataclass
from typing import Literal

Role = Literal["q", "k", "v", "o", "gate", "up", "down", "other"]  # what a linear layer does in its block


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
    """Tensors that are not split and differ only in their numbers, "model.layers.*.input_layernorm.weight"."""

    pattern: str
    count: int
    elements: int

    @property
    def size(self) -> str:
        """Number of tensors and elements, in words."""
        return f"{self.count:,} {'tensor' if self.count == 1 else 'tensors'}, {self.elements:,} elements"


@dataclass(frozen=True)
class Coverage:
    """How much of a model is split. Tied tensors count once; persistent buffers count."""

    weights: int
    elements_split: int
    elements: int
    left: tuple[LeftTensors, ...]  # largest first

    @property
    def share(self) -> float:
        """Split elements over all elements, 0 to 1."""
        return self.elements_split / self.elements
