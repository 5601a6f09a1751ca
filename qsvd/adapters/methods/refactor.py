"""FedSVD's new factors of a trained product: B A = (U S) V^T, with orthonormal rows in the new A.

Shape suffixes as in adapter.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Protocol

import torch
from torch import nn

from qsvd.adapters.methods.hooks import Course, Hooks
from qsvd.option_types import Help, at_least


@dataclass(frozen=True, kw_only=True)
class RefactorOptions:
    """The option of methods whose factors can be replaced."""

    refactor_every: Annotated[
        int | None,
        at_least(1),
        Help("Steps between two changes of the factors to U S and V^T of B A (FedSVD, arXiv:2505.12805)."),
    ] = None


class Refactored(Protocol):
    """An adapter whose factors can be replaced."""

    refactor_every: int | None

    def refactor(self) -> list[nn.Parameter]:
        """Replace the factors by others with the same product; return the parameters that have new values."""
        ...


class Refactor(Hooks):
    """Replaces the factors of all layers after every N-th step (FedSVD, arXiv:2505.12805, algorithm 1).

    FedSVD does so between the rounds of its clients, each of which begins with an optimizer without state; here the
    optimizer forgets its moments, which belong to the factors before.
    """

    def __init__(self, adapters: Mapping[str, Refactored], course: Course):
        super().__init__(adapters, course)
        self.every = next(iter(adapters.values())).refactor_every

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        if self.every is None or step % self.every:
            return
        for adapter in self.adapters.values():
            self.course.forget(adapter.refactor())
