"""One trained matrix on both sides of a product: what SingLoRA and SymLoRA share. Shape suffixes as in adapter.py."""

import torch
from torch import Tensor, nn

from qsvd.adapters.adapter import AdapterOptions, StoredWeight
from qsvd.adapters.methods.added import Added, joined, kaiming
from qsvd.plan.tensors import AdapterTensors, TensorShape


class Mirrored(Added):
    """Trains D [K, M], M = max(O, I): a product of its first O columns, transposed, and its first I columns.

    In a square weight it is D^T D, which is symmetric. D is drawn as LoRA's A for M inputs.
    """

    def __init__(self, stored: StoredWeight, options: AdapterOptions, generator: torch.Generator):
        rank, scale = self.size(stored, options)
        super().__init__(stored, scale=scale)
        self.shape = stored.residual.shape
        drawn_KM = kaiming(rank, max(self.shape), generator)
        self.down = nn.Parameter(drawn_KM.to(stored.up_OR.device, options.torch_dtype))

    @classmethod
    def parts(cls, shape: tuple[int, int], rank: int, dtype: torch.dtype) -> dict[str, TensorShape]:
        """Return the shapes of what is trained."""
        return {"down": TensorShape((rank, max(shape)), dtype)}

    @classmethod
    def tensors(
        cls, shape: tuple[int, int], stored_rank: int, rank: int, dtype: torch.dtype, stored_dtype: torch.dtype
    ) -> AdapterTensors:
        rank = min(rank, *shape)
        return joined(shape, stored_rank, cls.parts(shape, rank, dtype), rank, (dtype, stored_dtype))

    def scaled(self, factor: float | Tensor) -> tuple[Tensor, Tensor]:
        """Return the left part [O, K], times a number or numbers [K], and the right part [K, I]."""
        rows, columns = self.shape
        left_OK = self.down[:, :rows].T * factor
        return left_OK, self.down if columns == self.down.shape[1] else self.down[:, :columns]
