"""What a method that trains stored components leaves of a weight that stores none: the residual, as it is.

Shape suffixes as in adapter.py.
"""

import torch
from torch import Tensor

from qsvd.adapters.adapter import Adapter, AdapterOptions, Defaults, Principal, stored_factors
from qsvd.plan.tensors import AdapterTensors


class Frozen(Adapter):
    """W' = Q. Parameters: none."""

    defaults = Defaults(rank=None, alpha=None, learning_rate=0.0, reason="nothing is trained")

    def __init__(self, up_OR: Tensor, down_RI: Tensor):
        super().__init__()
        self.register_buffer("frozen_up", up_OR, persistent=False)
        self.register_buffer("frozen_down", down_RI, persistent=False)

    @classmethod
    def start(cls, principal: Principal, options: AdapterOptions, generator: torch.Generator) -> "Frozen":
        del options, generator  # nothing is chosen or drawn
        return cls(principal.up_OR.float(), principal.down_RI.float())

    @classmethod
    def tensors(
        cls, shape: tuple[int, int], stored_rank: int, rank: int, dtype: torch.dtype, stored_dtype: torch.dtype
    ) -> AdapterTensors:
        del rank, dtype, stored_dtype
        return AdapterTensors(parameters={}, buffers=stored_factors(shape, stored_rank, torch.float32), made={})

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.get_buffer("frozen_up"), self.get_buffer("frozen_down")
