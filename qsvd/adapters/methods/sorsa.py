"""SORSA: singular vectors and values of the stored components are trained. Shape suffixes as in adapter.py."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from qsvd.adapters.adapter import Adapter, AdapterOptions, Defaults, StoredWeight, check_as_stored
from qsvd.adapters.methods.hooks import Hooks
from qsvd.adapters.methods.orthonormal import add_gradient
from qsvd.numerics.svd import product_svd
from qsvd.option_types import FROM_ZERO, Help
from qsvd.plan.tensors import AdapterTensors, TensorShape


@dataclass(frozen=True, kw_only=True)
class SorsaOptions:
    """The options of SORSA's own."""

    gamma: Annotated[
        float, FROM_ZERO, Help("Weight of the orthonormality loss, as a part of the first learning rate.")
    ] = 4e-4


class _Orthonormal(Hooks):
    """Adds (gamma / highest rate) times the gradient of the orthonormality loss, so that it follows the schedule."""

    def transform_grads(self, step: int) -> None:
        del step
        count = 2 * len(self.adapters)
        for adapter in self.adapters.values():
            weight = adapter.gamma / self.course.learning_rate / count
            add_gradient(adapter.down, weight)
            add_gradient(adapter.up, weight, columns=True)


class Sorsa(Adapter):
    """SORSA (arXiv:2409.00055, section 3): W' = Q + U diag(S) V^T, with U, S and V^T trained.

    Parameters: R (O + I + 1). U S V^T are the stored components, decomposed in float64: they differ from them by the
    rounding of the adapter's dtype. The loss gets gamma times the mean of ||U^T U - I||_F and ||V^T V - I||_F over all
    layers. As in the authors' code its gradient is added after clipping.
    """

    paper = "2409.00055"
    starts_as = "the components as U, S, V"
    defaults = Defaults(rank=None, scale=1.0, learning_rate=3e-5, reason="the authors' rate for 7B models at rank 128")
    options = SorsaOptions
    hooks = _Orthonormal
    needs_components = True
    takes_rank = False

    def __init__(self, up_OR: Tensor, values_R: Tensor, down_RI: Tensor, gamma: float):
        super().__init__()
        self.gamma = gamma
        self.up, self.diagonal, self.down = nn.Parameter(up_OR), nn.Parameter(values_R), nn.Parameter(down_RI)

    @classmethod
    def start(cls, stored: StoredWeight, options: AdapterOptions, generator: torch.Generator) -> "Sorsa":
        del generator  # nothing is drawn
        check_as_stored("sorsa", stored, options)
        found = product_svd(stored.up_OR, stored.down_RI)
        parts = (found.left_OK, found.values_K, found.right_KI)
        up_OR, values_R, down_RI = (part.contiguous().to(options.torch_dtype) for part in parts)
        return cls(up_OR, values_R, down_RI, cls.own(options).gamma)

    @classmethod
    def tensors(
        cls, shape: tuple[int, int], stored_rank: int, rank: int, dtype: torch.dtype, stored_dtype: torch.dtype
    ) -> AdapterTensors:
        del stored_rank, stored_dtype  # the components are trained, in another dtype
        parameters = {
            "up": TensorShape((shape[0], rank), dtype),
            "diagonal": TensorShape((rank,), dtype),
            "down": TensorShape((rank, shape[1]), dtype),
        }
        return AdapterTensors(parameters, buffers={}, made={"up": TensorShape((shape[0], rank), dtype)})

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.up * self.diagonal, self.down


METHOD = Sorsa
