"""A trained core between frozen singular directions: W' = Q + B0 A0 + (alpha / K) U R (U^T B0) A0.

U [O, K] has the leading left singular vectors of B0 A0. With B0 A0 = U S V^T the sum is U (I + (alpha / K) R) S V^T:
one stored pair of factors serves the components and the adapter. Shape suffixes as in adapter.py.
"""

import torch
from torch import Tensor, nn

from qsvd.adapters.adapter import Adapter, AdapterOptions, StoredWeight, frozen_shapes, no_components
from qsvd.errors import BadInput
from qsvd.numerics.svd import product_svd
from qsvd.plan.tensors import AdapterTensors, TensorShape


class Core(Adapter):
    """A core R [K, K], zero at the start, where it has a gradient, unlike LoRA's product.

    The core is in `adapter_dtype`; the directions are in the dtype of the components.
    """

    needs_components = True

    def __init__(self, stored: StoredWeight, rank: int, scale: float, dtype: torch.dtype):
        super().__init__()
        self.scale = scale
        up_OR, down_RI = stored.up_OR, stored.down_RI
        directions_OR = product_svd(up_OR, down_RI).left_OK  # a saved core is valid only between the same directions
        frozen = {
            "frozen_up": up_OR,
            "frozen_down": down_RI,
            "directions": directions_OR[:, :rank].to(up_OR.dtype),
            "inner": directions_OR[:, :rank].T @ up_OR.float(),
        }
        for name, tensor in frozen.items():
            self.register_buffer(name, tensor.contiguous(), persistent=False)
        self.core = nn.Parameter(torch.zeros(rank, rank, dtype=dtype, device=up_OR.device))

    @classmethod
    def start(cls, stored: StoredWeight, options: AdapterOptions, generator: torch.Generator) -> "Core":
        del generator  # nothing is random
        if stored.rank == 0:
            raise no_components(options.method or "")
        rank, scale = cls.defaults.rank_and_scale(options, stored.rank)
        if not 1 <= rank <= stored.rank:
            raise BadInput(f"rank {rank} is outside 1..{stored.rank}, the stored components")
        return cls(stored, rank, scale, options.torch_dtype)

    @classmethod
    def tensors(
        cls, shape: tuple[int, int], stored_rank: int, rank: int, dtype: torch.dtype, stored_dtype: torch.dtype
    ) -> AdapterTensors:
        rows = shape[0]
        constants = {
            "directions": TensorShape((rows, rank), stored_dtype),
            "inner": TensorShape((rank, stored_rank), torch.float32),
        }
        made = {"up": TensorShape((rows, stored_rank), torch.float32)}
        if stored_dtype != torch.float32:
            made["exact_directions"] = TensorShape((rows, rank), torch.float32)
        parameters = {"core": TensorShape((rank, rank), dtype)}
        return AdapterTensors(parameters, frozen_shapes(shape, stored_rank, stored_dtype) | constants, made)

    def factors(self) -> tuple[Tensor, Tensor]:
        inner_KR, frozen_OR = self.get_buffer("inner"), self.get_buffer("frozen_up")  # float32, and as stored
        core_KR = self.scale * self.core.to(inner_KR) @ inner_KR
        up_OR = frozen_OR.to(inner_KR) + self.get_buffer("directions").to(inner_KR) @ core_KR
        return up_OR, self.get_buffer("frozen_down")
