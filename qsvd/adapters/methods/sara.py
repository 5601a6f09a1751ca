"""SARA: triplets of a singular value decomposition are added, as many to each layer as it has stored components.

Shape suffixes as in adapter.py.
"""

import torch
from torch import Tensor, nn

from qsvd.adapters.adapter import AdapterOptions, Defaults, StoredWeight, no_components
from qsvd.adapters.methods.added import Added, joined, kaiming
from qsvd.plan.tensors import AdapterTensors, TensorShape


class Sara(Added):
    """SARA (arXiv:2408.03290): W' = Q + B0 A0 + (alpha / K) B diag(lam) A; B, lam and A are trained, from lam = 0.

    The paper counts the leading singular values of each weight whose sum stays below a share of all, and gives the
    weight that rank. `qsvd quantize --budget SIZE --allocator sara` stores components by this rule, and K is the stored
    rank of each weight, or --rank; a weight without components stays frozen. No code of the authors is known: here A
    and B are drawn as LoRA draws A, and lam = 0 starts at the quantized model. Parameters: K (O + I + 1).
    """

    paper = "2408.03290"
    starts_as = "zero, added"
    defaults = Defaults(
        rank=None, scale=1.0, learning_rate=5e-4, reason="that of adalora, which has the same factors; not measured"
    )
    needs_components = True
    component_use = "takes the rank of each layer from its stored components"

    def __init__(self, stored: StoredWeight, options: AdapterOptions, generator: torch.Generator):
        rank, scale = self.size(stored, options)
        super().__init__(stored, scale=scale)
        (rows, columns), device, dtype = stored.residual.shape, stored.up_OR.device, options.torch_dtype
        down_KI, up_OK = kaiming(rank, columns, generator), kaiming(rows, rank, generator)
        self.up, self.down = (nn.Parameter(factor.to(device, dtype)) for factor in (up_OK, down_KI))
        self.diagonal = nn.Parameter(torch.zeros(rank, dtype=dtype, device=device))

    @classmethod
    def start(cls, stored: StoredWeight, options: AdapterOptions, generator: torch.Generator) -> "Sara":
        if stored.rank == 0:
            raise no_components("sara", cls.component_use)
        return cls(stored, options, generator)

    @classmethod
    def tensors(
        cls, shape: tuple[int, int], stored_rank: int, rank: int, dtype: torch.dtype, stored_dtype: torch.dtype
    ) -> AdapterTensors:
        rank = min(rank, *shape)
        sizes = {"up": (shape[0], rank), "down": (rank, shape[1]), "diagonal": (rank,)}
        parameters = {part: TensorShape(size, dtype) for part, size in sizes.items()}
        found = joined(shape, stored_rank, parameters, rank, (dtype, stored_dtype))
        return AdapterTensors(parameters, found.buffers, {**found.made, "scaled": TensorShape((rank,), dtype)})

    def added(self) -> tuple[Tensor, Tensor]:
        return self.up * (self.scale * self.diagonal), self.down


METHOD = Sara
