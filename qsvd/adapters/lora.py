"""LoRA beside what is frozen: the residual alone (QLoRA, arXiv:2305.14314) or with its principal components.

Shape suffixes as in adapter.py.
"""

import math

import torch
from torch import Tensor, nn

from qsvd.adapters.adapter import Adapter, AdapterOptions, Defaults, Principal, chosen, stored_factors
from qsvd.plan.tensors import AdapterTensors, TensorShape


class Lora(Adapter):
    """W' = Q + B0 A0 + (alpha / K) B A, with B and A trained from B = 0 (arXiv:2106.09685, section 4.1).

    Parameters: K (O + I). K is cut to the smaller side of the weight, the scale stays.
    """

    defaults = Defaults(
        rank=64,
        alpha=16,
        learning_rate=2e-4,
        reason="QLoRA's own rank, alpha and rate for 7B and 13B",
    )

    def __init__(self, principal: Principal, up_OK: Tensor, down_KI: Tensor, scale: float):
        super().__init__()
        self.scale = scale
        self.up = nn.Parameter(up_OK)
        self.down = nn.Parameter(down_KI)
        self.register_buffer("frozen_up", principal.up_OR, persistent=False)
        self.register_buffer("frozen_down", principal.down_RI, persistent=False)

    @classmethod
    def start(cls, principal: Principal, options: AdapterOptions, generator: torch.Generator) -> "Lora":
        rank, scale = chosen(options, cls.defaults, principal.rank)
        out_features, in_features = principal.residual.shape
        if rank < 1:
            raise ValueError(f"rank {rank} is below 1, the least that trains anything")
        rank = min(rank, out_features, in_features)  # more would only repeat
        bound = 1 / math.sqrt(in_features)  # Kaiming's uniform bound with a = sqrt 5, as LoRA and PEFT draw A
        down_KI = torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)
        device = principal.up_OR.device
        up_OK = torch.zeros(out_features, rank, dtype=options.torch_dtype, device=device)
        return cls(principal, up_OK, down_KI.to(device, options.torch_dtype), scale)

    @classmethod
    def tensors(
        cls, shape: tuple[int, int], stored_rank: int, rank: int, dtype: torch.dtype, stored_dtype: torch.dtype
    ) -> AdapterTensors:
        rows, columns = shape
        rank = min(rank, rows, columns)
        parameters = {"up": TensorShape((rows, rank), dtype), "down": TensorShape((rank, columns), dtype)}
        both = stored_rank + rank
        made = {"up": TensorShape((rows, both), dtype)}  # scaled, and beside the frozen ones
        if stored_rank:
            made["down"] = TensorShape((both, columns), dtype)
        return AdapterTensors(parameters, stored_factors(shape, stored_rank, stored_dtype), made)

    def factors(self) -> tuple[Tensor, Tensor]:
        up_OK = self.scale * self.up
        frozen_up, frozen_down = self.get_buffer("frozen_up"), self.get_buffer("frozen_down")
        if not len(frozen_down):
            return up_OK, self.down
        down_KI = 1 * self.down  # else its gradient is a view that keeps the frozen part's alive
        return torch.cat((frozen_up.to(up_OK), up_OK), dim=1), torch.cat((frozen_down.to(self.down), down_KI))
