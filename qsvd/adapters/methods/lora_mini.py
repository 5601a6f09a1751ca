"""LoRA-Mini: two trained factors between two frozen ones. Shape suffixes as in adapter.py."""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from qsvd.adapters.adapter import AdapterOptions, Defaults, StoredWeight
from qsvd.adapters.methods.added import AddedBySize, kaiming
from qsvd.numerics.svd import product_svd
from qsvd.option_types import Help, at_least
from qsvd.plan.tensors import AdapterTensors, TensorShape


@dataclass(frozen=True, kw_only=True)
class LoraMiniOptions:
    """The options of LoRA-Mini's own."""

    outer_out: Annotated[int, at_least(1), Help("Columns of the frozen factor at the outputs.")] = 64
    outer_in: Annotated[int, at_least(1), Help("Rows of the frozen factor at the inputs.")] = 64


class LoraMini(AddedBySize):
    """LoRA-Mini (arXiv:2411.15804): W' = Q + B0 A0 + (alpha / K) Bo B A Ao; B [b, K] and A [K, a] trained, from B = 0.

    The outer factors Bo [O, b] and Ao [a, I] are frozen. The paper's start was not found: here they are the leading
    singular directions of the stored components, and beyond their rank, or without components, random directions; all
    are orthonormal. They are made again when a run is loaded, in the dtype of the components. A0 and Ao are one tensor,
    and the backward pass needs x Ao^T [T, a] and no x. Parameters: K (a + b). b is cut to O, a to I, and K to the
    smaller of both.
    """

    paper = "2411.15804"
    starts_as = "zero, added"
    defaults = Defaults(
        rank=16,
        scale=1.0,
        learning_rate=1e-3,
        reason="ours, since the paper's were not found: few trained parameters allow a higher rate; not measured",
    )
    options = LoraMiniOptions

    def __init__(self, stored: StoredWeight, options: AdapterOptions, generator: torch.Generator):
        rank, scale = self.size(stored, options)
        super().__init__(stored, scale=scale)
        self.stored_rank = stored.rank
        found = product_svd(stored.up_OR, stored.down_RI)
        outs, ins = _outer(self.own(options), stored.residual.shape)
        rank, device, dtype = min(rank, outs, ins), stored.up_OR.device, options.torch_dtype
        outer_Ob = orthonormal(found.left_OK, outs, generator).to(stored.up_OR)
        outer_Ia = orthonormal(found.right_KI.T, ins, generator).to(stored.down_RI)
        self.register_buffer("outer_up", outer_Ob.contiguous(), persistent=False)
        self.register_buffer("frozen_down", torch.cat((stored.down_RI, outer_Ia.T)), persistent=False)
        self.inner_up = nn.Parameter(torch.zeros(outs, rank, dtype=dtype, device=device))
        self.inner_down = nn.Parameter(kaiming(rank, ins, generator).to(device, dtype))

    @classmethod
    def start(cls, stored: StoredWeight, options: AdapterOptions, generator: torch.Generator) -> "LoraMini":
        return cls(stored, options, generator)

    @classmethod
    def tensors_for(
        cls, own: Any, shape: tuple[int, int], stored_rank: int, rank: int, dtypes: tuple[torch.dtype, torch.dtype]
    ) -> AdapterTensors:
        (rows, columns), (dtype, stored_dtype), (outs, ins) = shape, dtypes, _outer(own, shape)
        rank, both = min(rank, outs, ins), stored_rank + ins
        made = {"up": TensorShape((rows, both), dtype)}
        if stored_dtype != dtype:
            made["exact_outer"] = TensorShape((rows, outs), dtype)
        return AdapterTensors(
            parameters={"inner_up": TensorShape((outs, rank), dtype), "inner_down": TensorShape((rank, ins), dtype)},
            buffers={
                "frozen_up": TensorShape((rows, stored_rank), stored_dtype),
                "frozen_down": TensorShape((both, columns), stored_dtype),
                "outer_up": TensorShape((rows, outs), stored_dtype),
            },
            made=made,
        )

    def added(self) -> tuple[Tensor, Tensor]:
        core_ba = self.scale * (self.inner_up @ self.inner_down)
        up_Oa = self.get_buffer("outer_up").to(core_ba) @ core_ba
        return up_Oa, self.get_buffer("frozen_down")[self.stored_rank :]

    def factors(self) -> tuple[Tensor, Tensor]:
        up_OK, _ = self.added()
        if self.stored_rank:
            up_OK = torch.cat((self.get_buffer("frozen_up").to(up_OK), up_OK), dim=1)
        return up_OK, self.get_buffer("frozen_down")

    def exported(self) -> tuple[Tensor, Tensor]:
        """Return the factors of rank R + K, less than the R + a of the layer."""
        inner_up, inner_down = self.scale * self.inner_up.float(), self.inner_down.float()
        down_KI = self.get_buffer("frozen_down").float()
        stored_RI, outer_aI = down_KI[: self.stored_rank], down_KI[self.stored_rank :]
        up_OK = torch.cat((self.get_buffer("frozen_up").float(), self.get_buffer("outer_up").float() @ inner_up), dim=1)
        return up_OK, torch.cat((stored_RI, inner_down @ outer_aI))


def _outer(own: LoraMiniOptions, shape: tuple[int, int]) -> tuple[int, int]:
    """Return b and a for a weight [O, I]."""
    return min(own.outer_out, shape[0]), min(own.outer_in, shape[1])


def orthonormal(known_NR: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return orthonormal columns, float32 [N, count] on the CPU: the first known ones, then random ones.

    Args:
        known_NR: Orthonormal columns.
        count: At most N.
    """
    known_NR = known_NR[:, :count].cpu()
    missing = count - known_NR.shape[1]
    drawn = torch.empty(len(known_NR), missing).normal_(generator=generator)
    if not missing:
        return known_NR
    basis, upper = torch.linalg.qr(torch.cat((known_NR, drawn), dim=1).double())
    basis *= upper.diagonal().sign()  # the only one of its kind, whichever library computes it
    return torch.cat((known_NR, basis[:, -missing:].float()), dim=1)


METHOD = LoraMini
