"""R-LoRA: one A, several heads B that start at random, and a router that mixes them. Shape suffixes as in adapter.py.

T = tokens, N = heads.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qsvd.adapters.adapter import AdapterOptions, Defaults, StoredWeight, frozen_shapes
from qsvd.adapters.methods.added import size_of
from qsvd.adapters.methods.frozen import Frozen
from qsvd.adapters.methods.mo_sara import NO_EXPORT_OF_ROUTERS
from qsvd.option_types import Help, at_least
from qsvd.plan.tensors import AdapterTensors, TensorShape

GAMMA = 64.0  # the authors' stable_gamma: A and the heads are multiplied by K^(1/4) / sqrt(gamma)


@dataclass(frozen=True, kw_only=True)
class RLoraOptions:
    """The options of R-LoRA's own."""

    heads: Annotated[int, at_least(2), Help("Heads B that the router mixes.")] = 5


def routed_heads(x_TI: Tensor, parts: Mapping[str, Tensor], dropout: float = 0.0, *, scale: float = 1.0) -> Tensor:
    """Return what is added, [T, O] in the dtype of x.

    Args:
        parts: Parameters and buffers of `RLora` by name.
        dropout: Of A x, drawn for each head.
    """
    dtype, heads = x_TI.dtype, len(parts["router"])
    shares_TN = (x_TI @ parts["router"].to(dtype).T).float().softmax(dim=1).to(dtype)
    hidden_TNK = (x_TI @ parts["down"].to(dtype).T)[:, None].expand(-1, heads, -1)
    if dropout:
        hidden_TNK = functional.dropout(hidden_TNK, dropout)
    added_TO = (shares_TN[:, :, None] * hidden_TNK).flatten(1) @ (scale * parts["up"]).to(dtype).T
    start_TK = x_TI @ parts["start_down"].to(dtype).T
    return added_TO.addmm_(start_TK, parts["start_up"].to(dtype).T, alpha=-scale)


class RLora(Frozen):
    """R-LoRA (arXiv:2502.15455): y = (Q + B0 A0) x + (alpha / K) (sum_n g_n(x) B_n drop_n(A x) - mean_n(B_n^0) A^0 x).

    The router is g(x) = softmax(R x). A, the heads B_n and R are trained. As in the authors' code the entries of A are
    drawn from N(0, 1 / I) and those of B_n from N(0, 1 / O), both times K^(1/4) / sqrt(64), and the mean of the first
    products is subtracted: from the 16-bit weight there, beside Q here, where it is saved with the run. R starts at
    zero, so that g is 1 / N and the start is exact; the authors draw R, and their loop multiplies A by its factor once
    for each head. Their scale is alpha / sqrt(K), with alpha = 32 at K = 4. up [O, N K] has the heads side by side.
    Parameters: K I + N K O + N I.
    """

    paper = "2502.15455"
    starts_as = "zero, added"
    defaults = Defaults(
        rank=4, scale=16.0, learning_rate=2e-4, reason="the authors' rank, scale and rate for Qwen2.5-0.5B"
    )
    options = RLoraOptions
    shared_options = ("dropout",)
    is_routed = True
    export_refusals = NO_EXPORT_OF_ROUTERS

    def __init__(self, stored: StoredWeight, options: AdapterOptions, generator: torch.Generator):
        super().__init__(stored.up_OR, stored.down_RI)
        rank, self.scale = size_of(self.defaults, stored, options)
        self.head_dropout = options.dropout  # `dropout` is for factors, which the layer multiplies
        (rows, columns), heads = stored.residual.shape, self.own(options).heads
        stable = rank**0.25 / GAMMA**0.5
        down_KI = torch.empty(rank, columns).normal_(0, stable * columns**-0.5, generator=generator)
        up_OJ = torch.empty(rows, heads * rank).normal_(0, stable * rows**-0.5, generator=generator)
        device, dtype = stored.up_OR.device, options.torch_dtype
        down_KI, up_OJ = down_KI.to(dtype), up_OJ.to(dtype)
        mean_OK = up_OJ.float().unflatten(1, (heads, rank)).mean(dim=1)
        self.down, self.up = (nn.Parameter(factor.to(device, copy=True)) for factor in (down_KI, up_OJ))
        self.router = nn.Parameter(torch.zeros(heads, columns, dtype=dtype, device=device))
        self.register_buffer("start_up", mean_OK.to(device, dtype))
        self.register_buffer("start_down", down_KI.to(device))

    @classmethod
    def start(cls, stored: StoredWeight, options: AdapterOptions, generator: torch.Generator) -> "RLora":
        return cls(stored, options, generator)

    @classmethod
    def tensors(
        cls, shape: tuple[int, int], stored_rank: int, rank: int, dtype: torch.dtype, stored_dtype: torch.dtype
    ) -> AdapterTensors:
        return cls.tensors_for(cls.options(), shape, stored_rank, rank, (dtype, stored_dtype))

    @classmethod
    def tensors_for(
        cls, own: Any, shape: tuple[int, int], stored_rank: int, rank: int, dtypes: tuple[torch.dtype, torch.dtype]
    ) -> AdapterTensors:
        dtype, stored_dtype = dtypes
        (rows, columns), rank = shape, min(rank, *shape)
        sizes = {"down": (rank, columns), "up": (rows, own.heads * rank), "router": (own.heads, columns)}
        start = {"start_up": TensorShape((rows, rank), dtype), "start_down": TensorShape((rank, columns), dtype)}
        return AdapterTensors(
            parameters={name: TensorShape(size, dtype) for name, size in sizes.items()},
            buffers=frozen_shapes(shape, stored_rank, stored_dtype) | start,
            made={},
            delta=routed_heads,
        )

    def delta(self, x_TI: Tensor) -> Tensor:
        parts = dict(self.named_parameters()) | dict(self.named_buffers())
        return routed_heads(x_TI, parts, self.head_dropout if self.training else 0.0, scale=self.scale)


METHOD = RLora
