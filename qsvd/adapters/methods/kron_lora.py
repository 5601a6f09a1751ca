"""Kron-LoRA: the Kronecker product of a small matrix and a LoRA. Shape suffixes as in adapter.py."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from qsvd.adapters.adapter import AdapterOptions, Defaults, StoredWeight
from qsvd.adapters.methods.added import AddedBySize, check_divides, joined, kaiming
from qsvd.option_types import Help, at_least
from qsvd.plan.tensors import AdapterTensors, TensorShape

DEVIATION = 0.02  # of the first B2


@dataclass(frozen=True, kw_only=True)
class KronLoraOptions:
    """The options of Kron-LoRA's own."""

    kron_out: Annotated[int, at_least(1), Help("Rows of the Kronecker factor; must divide the outputs of a layer.")] = 4
    kron_in: Annotated[
        int, at_least(1), Help("Columns of the Kronecker factor; must divide the inputs of a layer.")
    ] = 4


class KronLora(AddedBySize):
    """Kron-LoRA (arXiv:2508.01961): W' = Q + B0 A0 + (alpha / K) C (x) (B A); C, B and A are trained, from B = 0.

    (x) is the Kronecker product of C [a2, a1] and B A, with B [O / a2, K] and A [K, I / a1]: exactly the LoRA
    (C (x) B) (1 (x) A) of rank a1 K. Parameters: a1 a2 + K (O / a2 + I / a1). K is cut to the smaller side of B A.
    PEFT's LoKr with `decompose_factor` is the same map where that factor divides the sides; it starts from C = 0.
    """

    paper = "2508.01961"
    starts_as = "zero, added"
    defaults = Defaults(
        rank=8,
        scale=32 / 8,
        learning_rate=2e-4,
        reason="rank and alpha of a third-party port; lora's rate, since the paper's was not found; not measured",
    )
    options = KronLoraOptions

    def __init__(self, stored: StoredWeight, options: AdapterOptions, generator: torch.Generator):
        rank, scale = self.size(stored, options)
        super().__init__(stored, scale=scale)
        device, dtype, own = stored.up_OR.device, options.torch_dtype, self.own(options)
        rows, columns = _inner(own, stored.residual.shape)
        rank = min(rank, rows, columns)
        down_KI = torch.empty(rank, columns).normal_(0, DEVIATION, generator=generator)
        self.kron = nn.Parameter(kaiming(own.kron_out, own.kron_in, generator).to(device, dtype))
        self.up = nn.Parameter(torch.zeros(rows, rank, dtype=dtype, device=device))
        self.down = nn.Parameter(down_KI.to(device, dtype))

    @classmethod
    def start(cls, stored: StoredWeight, options: AdapterOptions, generator: torch.Generator) -> "KronLora":
        cls.check_shapes({stored.name: stored.residual.shape}, options)
        return cls(stored, options, generator)

    @classmethod
    def check_shapes(cls, shapes: Mapping[str, tuple[int, int]], options: AdapterOptions) -> None:
        own = cls.own(options)
        check_divides("kron-lora", {"kron_out": (own.kron_out, (0,)), "kron_in": (own.kron_in, (1,))}, shapes)

    @classmethod
    def tensors_for(
        cls, own: Any, shape: tuple[int, int], stored_rank: int, rank: int, dtypes: tuple[torch.dtype, torch.dtype]
    ) -> AdapterTensors:
        dtype, (rows, columns) = dtypes[0], _inner(own, shape)
        rank = min(rank, rows, columns)
        parameters = {
            "kron": TensorShape((own.kron_out, own.kron_in), dtype),
            "up": TensorShape((rows, rank), dtype),
            "down": TensorShape((rank, columns), dtype),
        }
        found = joined(shape, stored_rank, parameters, own.kron_in * rank, dtypes)
        down = TensorShape((stored_rank + own.kron_in * rank, shape[1]), dtype)
        return AdapterTensors(parameters, found.buffers, {**found.made, "down": down})

    def added(self) -> tuple[Tensor, Tensor]:
        up_OK = self.scale * torch.kron(self.kron, self.up)
        return up_OK, torch.block_diag(*[self.down] * self.kron.shape[1])


def _inner(own: KronLoraOptions, shape: tuple[int, int]) -> tuple[int, int]:
    """Return the shape of B A for a weight [O, I]."""
    return shape[0] // own.kron_out, shape[1] // own.kron_in


METHOD = KronLora
