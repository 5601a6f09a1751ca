"""LoRA-GA: LoRA that starts from singular vectors of the gradient of the loss. Shape suffixes as in adapter.py."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor, nn

from qsvd.adapters.adapter import AdapterOptions, Defaults, StoredWeight
from qsvd.adapters.methods.added import Added, joined
from qsvd.errors import BadInput
from qsvd.files.statistics import most_rank
from qsvd.option_types import ABOVE_ZERO, SAME_RESULT, Help
from qsvd.plan.tensors import AdapterTensors, TensorShape


@dataclass(frozen=True, kw_only=True)
class LoraGaOptions:
    """The options of LoRA-GA's own."""

    gradients: Annotated[
        Path | None, SAME_RESULT, Help("Output of qsvd calibrate --gradient-rank on the 16-bit model.", "FILE")
    ] = None
    gamma: Annotated[float, ABOVE_ZERO, Help("The first B A is sqrt(out) / gamma times an orthonormal product.")] = 16.0


class LoraGa(Added):
    """LoRA-GA (arXiv:2407.05000, theorem 3.2): W' = Q + B0 A0 + (alpha / K) (B A - B1 A1), with B and A from B1 and A1.

    With the gradient of the loss U S V^T, A1 = c V[:, :K]^T and B1 = c U[:, K:2K], c = O^(1/4) / sqrt(gamma): the
    authors' code with its defaults (direction ArB2r, scale stable). They subtract B1 A1 from the 16-bit weight; here it
    stays beside Q, as [B - B1, B1] [A; A - A1], which is 0 at the start to the bit. K is at most half of the smaller
    side of the weight. Parameters: K (O + I). B1 and A1 are saved with them.
    """

    defaults = Defaults(
        rank=32, scale=8 / 32, learning_rate=2e-5, reason="the authors' rank, alpha and rate for Llama 2 7B"
    )
    paper = "2407.05000"
    starts_as = "zero, added"
    options = LoraGaOptions
    shared_options = ("rslora",)
    starts_from_gradient = True

    def __init__(self, stored: StoredWeight, up_OK: Tensor, down_KI: Tensor, *, scale: float):
        super().__init__(stored, scale=scale)
        self.up, self.down = nn.Parameter(up_OK), nn.Parameter(down_KI)
        self.register_buffer("start_up", up_OK.clone())
        self.register_buffer("start_down", down_KI.clone())

    @classmethod
    def start(cls, stored: StoredWeight, options: AdapterOptions, generator: torch.Generator) -> "LoraGa":
        del generator  # nothing is drawn
        rank, scale = cls.size(stored, options)
        (rows, columns), like = stored.residual.shape, torch.empty(0, dtype=options.torch_dtype)
        rank = most_rank(rank, (rows, columns))
        if stored.gradient is None:  # the tensors of a run follow
            left, right = like.new_zeros(rows, 2 * rank), like.new_zeros(rank, columns)
        else:
            left, right = stored.gradient
        if len(right) < rank:
            raise BadInput(f"its gradient has rank {len(right)}, below {rank}, the rank to train")
        size = rows**0.25 / cls.own(options).gamma ** 0.5
        parts = (size * left[:, rank : 2 * rank], size * right[:rank])
        up_OK, down_KI = (part.to(stored.up_OR.device, options.torch_dtype).contiguous() for part in parts)
        return cls(stored, up_OK, down_KI, scale=scale)

    @classmethod
    def tensors(
        cls, shape: tuple[int, int], stored_rank: int, rank: int, dtype: torch.dtype, stored_dtype: torch.dtype
    ) -> AdapterTensors:
        rank = most_rank(rank, shape)
        up, down = TensorShape((shape[0], rank), dtype), TensorShape((rank, shape[1]), dtype)
        found = joined(shape, stored_rank, {"up": up, "down": down}, 2 * rank, (dtype, stored_dtype))
        return replace(
            found,
            buffers={**found.buffers, "start_up": up, "start_down": down},
            made={**found.made, "down": TensorShape((stored_rank + 2 * rank, shape[1]), dtype)},
        )

    def added(self) -> tuple[Tensor, Tensor]:
        start_up, start_down = self.get_buffer("start_up"), self.get_buffer("start_down")
        up_OK = torch.cat((self.scale * (self.up - start_up), self.scale * start_up), dim=1)
        return up_OK, torch.cat((self.down, self.down - start_down))

    def pair(self) -> tuple[nn.Parameter, nn.Parameter]:
        return self.up, self.down


METHOD = LoraGa
