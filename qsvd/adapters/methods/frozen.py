"""No training: for the layers that a run leaves as they are. Shape suffixes as in adapter.py."""

import torch
from torch import Tensor

from qsvd.adapters.adapter import Adapter, AdapterOptions, Defaults, StoredWeight, frozen_shapes
from qsvd.plan.tensors import AdapterTensors


class Frozen(Adapter):
    """W' = Q + B0 A0: for a layer that is not to be trained, or without components where the method needs them.

    Parameters: none.
    """

    defaults = Defaults(rank=None, scale=1.0, learning_rate=0.0, reason="nothing is trained")

    def __init__(self, up_OR: Tensor, down_RI: Tensor):
        super().__init__()
        self.register_buffer("frozen_up", up_OR, persistent=False)
        self.register_buffer("frozen_down", down_RI, persistent=False)

    @classmethod
    def start(cls, stored: StoredWeight, options: AdapterOptions, generator: torch.Generator) -> "Frozen":
        del options, generator  # nothing is chosen or drawn
        return cls(stored.up_OR, stored.down_RI)

    @classmethod
    def tensors(
        cls, shape: tuple[int, int], stored_rank: int, rank: int, dtype: torch.dtype, stored_dtype: torch.dtype
    ) -> AdapterTensors:
        del rank, dtype
        return AdapterTensors(parameters={}, buffers=frozen_shapes(shape, stored_rank, stored_dtype), made={})

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.get_buffer("frozen_up"), self.get_buffer("frozen_down")
