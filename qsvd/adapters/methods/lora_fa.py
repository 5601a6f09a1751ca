"""LoRA-FA: LoRA with A frozen. Shape suffixes as in adapter.py."""

import torch
from torch import Tensor, nn

from qsvd.adapters.adapter import AdapterOptions, Defaults, StoredWeight
from qsvd.adapters.methods.added import Added, kaiming
from qsvd.plan.tensors import AdapterTensors, TensorShape


class LoraFa(Added):
    """LoRA-FA (arXiv:2308.03303): W' = Q + B0 A0 + (alpha / K) B A, with B trained from 0 and A random and frozen.

    The backward pass needs x A^T [T, K] and no x. Parameters: K O. A0 and A are one tensor, in the dtype of the
    components.
    """

    paper = "2308.03303"
    starts_as = "zero, added"
    defaults = Defaults(
        rank=64, scale=16 / 64, learning_rate=2e-4, reason="those of lora: B moves as it does there in its first steps"
    )
    shared_options = ("rslora",)

    def __init__(self, stored: StoredWeight, up_OK: Tensor, down_KI: Tensor, *, scale: float):
        super().__init__(stored, scale=scale)
        self.stored_rank = stored.rank
        self.up = nn.Parameter(up_OK)
        both = torch.cat((stored.down_RI, down_KI.to(stored.down_RI)))
        self.register_buffer("frozen_down", both, persistent=False)

    @classmethod
    def start(cls, stored: StoredWeight, options: AdapterOptions, generator: torch.Generator) -> "LoraFa":
        rank, scale = cls.size(stored, options)
        out_features, in_features = stored.residual.shape
        up_OK = torch.zeros(out_features, rank, dtype=options.torch_dtype, device=stored.up_OR.device)
        return cls(stored, up_OK, kaiming(rank, in_features, generator), scale=scale)

    @classmethod
    def tensors(
        cls, shape: tuple[int, int], stored_rank: int, rank: int, dtype: torch.dtype, stored_dtype: torch.dtype
    ) -> AdapterTensors:
        (rows, columns), rank = shape, min(rank, *shape)
        both = stored_rank + rank
        return AdapterTensors(
            parameters={"up": TensorShape((rows, rank), dtype)},
            buffers={
                "frozen_up": TensorShape((rows, stored_rank), stored_dtype),
                "frozen_down": TensorShape((both, columns), stored_dtype),
            },
            made={"up": TensorShape((rows, both), dtype)},
        )

    def added(self) -> tuple[Tensor, Tensor]:
        return self.scale * self.up, self.get_buffer("frozen_down")[self.stored_rank :]

    def factors(self) -> tuple[Tensor, Tensor]:
        up_OK, frozen_up = self.scale * self.up, self.get_buffer("frozen_up")
        if self.stored_rank:
            up_OK = torch.cat((frozen_up.to(up_OK), up_OK), dim=1)
        return up_OK, self.get_buffer("frozen_down")


METHOD = LoraFa
