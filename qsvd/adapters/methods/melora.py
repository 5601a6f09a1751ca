"""MELoRA: a LoRA for each of N slices of the input, a block-diagonal product. Shape suffixes as in adapter.py."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from qsvd.adapters.adapter import AdapterOptions, Defaults, StoredWeight
from qsvd.adapters.methods.added import AddedBySize, check_divides, joined, kaiming
from qsvd.option_types import Help, at_least
from qsvd.plan.tensors import AdapterTensors, TensorShape


@dataclass(frozen=True, kw_only=True)
class MeLoraOptions:
    """The options of MELoRA's own."""

    blocks: Annotated[int, at_least(1), Help("Blocks of a layer; the number must divide both sides.")] = 8


class MeLora(AddedBySize):
    """MELoRA (arXiv:2402.17263): W' = Q + B0 A0 + (alpha / K) diag(B1 A1, ..., BN AN), with all Bi and Ai trained.

    Block i maps slice i of the inputs to slice i of the outputs; Bi [O / N, K] starts at 0. Together they are a LoRA of
    rank N K with K (O + I) parameters, those of a LoRA of rank K. `up` [O, K] has the Bi below each other, and `down`
    [K, I] the Ai next to each other. K is cut to the smaller side of a block.
    """

    paper = "2402.17263"
    starts_as = "zero, added"
    defaults = Defaults(
        rank=1, scale=16.0, learning_rate=3e-4, reason="the authors' rank, alpha, blocks and rate for Llama 2 7B"
    )
    options = MeLoraOptions
    shared_options = ("rslora",)

    def __init__(self, stored: StoredWeight, options: AdapterOptions, generator: torch.Generator):
        rank, scale = self.size(stored, options)
        super().__init__(stored, scale=scale)
        (rows, columns), device, dtype = stored.residual.shape, stored.up_OR.device, options.torch_dtype
        self.blocks = self.own(options).blocks
        rank = min(rank, min(rows, columns) // self.blocks)
        slices = [kaiming(rank, columns // self.blocks, generator) for _ in range(self.blocks)]
        self.up = nn.Parameter(torch.zeros(rows, rank, dtype=dtype, device=device))
        self.down = nn.Parameter(torch.cat(slices, dim=1).to(device, dtype))

    @classmethod
    def start(cls, stored: StoredWeight, options: AdapterOptions, generator: torch.Generator) -> "MeLora":
        cls.check_shapes({stored.name: stored.residual.shape}, options)
        return cls(stored, options, generator)

    @classmethod
    def check_shapes(cls, shapes: Mapping[str, tuple[int, int]], options: AdapterOptions) -> None:
        check_divides("melora", {"blocks": (cls.own(options).blocks, (0, 1))}, shapes)

    @classmethod
    def tensors_for(
        cls, own: Any, shape: tuple[int, int], stored_rank: int, rank: int, dtypes: tuple[torch.dtype, torch.dtype]
    ) -> AdapterTensors:
        (rows, columns), dtype, rank = shape, dtypes[0], min(rank, min(shape) // own.blocks)
        parameters = {"up": TensorShape((rows, rank), dtype), "down": TensorShape((rank, columns), dtype)}
        found = joined(shape, stored_rank, parameters, own.blocks * rank, dtypes)
        down = TensorShape((stored_rank + own.blocks * rank, columns), dtype)
        return AdapterTensors(parameters, found.buffers, {**found.made, "down": down})

    def added(self) -> tuple[Tensor, Tensor]:
        up_OK = torch.block_diag(*(self.scale * self.up).chunk(self.blocks))
        return up_OK, torch.block_diag(*self.down.chunk(self.blocks, dim=1))


METHOD = MeLora
