"""SymLoRA: one trained matrix on both sides of trained eigenvalues. Shape suffixes as in adapter.py."""

import torch
from torch import Tensor, nn

from qsvd.adapters.adapter import AdapterOptions, Defaults, StoredWeight
from qsvd.adapters.methods.mirrored import Mirrored
from qsvd.plan.tensors import AdapterTensors, TensorShape


class SymLora(Mirrored):
    """SymLoRA (arXiv:2504.03719): W' = Q + B0 A0 + (alpha / K) P diag(e) P*^T, with P [max(O, I), K] and e [K] trained.

    Only the abstract was read: it has square weights. P* has the first rows of P, as many as the smaller side, as in
    SingLoRA, and the product is transposed where I > O; `down` is P^T. e starts at 0, where it has a gradient, and may
    become negative. Parameters: K (max(O, I) + 1).
    """

    paper = "2504.03719"
    starts_as = "zero, added"
    defaults = Defaults(
        rank=8, scale=1.0, learning_rate=1e-3, reason="those of singlora, since the abstract has none; not measured"
    )

    def __init__(self, stored: StoredWeight, options: AdapterOptions, generator: torch.Generator):
        super().__init__(stored, options, generator)
        zeros_K = torch.zeros(len(self.down), dtype=options.torch_dtype, device=stored.up_OR.device)
        self.diagonal = nn.Parameter(zeros_K)

    @classmethod
    def start(cls, stored: StoredWeight, options: AdapterOptions, generator: torch.Generator) -> "SymLora":
        return cls(stored, options, generator)

    @classmethod
    def parts(cls, shape: tuple[int, int], rank: int, dtype: torch.dtype) -> dict[str, TensorShape]:
        return {**super().parts(shape, rank, dtype), "diagonal": TensorShape((rank,), dtype)}

    @classmethod
    def tensors(
        cls, shape: tuple[int, int], stored_rank: int, rank: int, dtype: torch.dtype, stored_dtype: torch.dtype
    ) -> AdapterTensors:
        found = super().tensors(shape, stored_rank, rank, dtype, stored_dtype)
        made = {**found.made, "scaled": TensorShape((min(rank, *shape),), dtype)}
        return AdapterTensors(found.parameters, found.buffers, made)

    def added(self) -> tuple[Tensor, Tensor]:
        return self.scaled(self.scale * self.diagonal)


METHOD = SymLora
