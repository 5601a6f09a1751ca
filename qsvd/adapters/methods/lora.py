"""LoRA, and QLoRA where no components are stored. Shape suffixes as in adapter.py."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from qsvd.adapters.adapter import AdapterOptions, Defaults, StoredWeight
from qsvd.adapters.methods.added import Added, joined, kaiming
from qsvd.adapters.methods.refactor import Refactor, RefactorOptions
from qsvd.numerics.svd import product_svd
from qsvd.option_types import ABOVE_ZERO, Help
from qsvd.plan.tensors import AdapterTensors, TensorShape


@dataclass(frozen=True, kw_only=True)
class LoraOptions(RefactorOptions):
    """The options of LoRA's own."""

    lora_plus_ratio: Annotated[
        float, ABOVE_ZERO, Help("Learning rate of B over that of A; 16 is LoRA+ (arXiv:2402.12354).")
    ] = 1.0


class Lora(Added):
    """LoRA (arXiv:2106.09685, section 4.1): W' = Q + B0 A0 + (alpha / K) B A, with B and A trained from B = 0.

    Without components it is QLoRA (arXiv:2305.14314). Parameters: K (O + I). K is cut to the smaller side of the
    weight; the scale is not changed. Dropout acts on the input of A, as in PEFT, and not on that of Q and A0.
    `refactor` rounds the new factors to their dtype.
    """

    paper = "2106.09685"
    starts_as = "zero, added"
    defaults = Defaults(
        rank=64,
        scale=16 / 64,
        learning_rate=2e-4,
        reason="QLoRA's rank, alpha / rank and rate for 7B and 13B",
    )
    options = LoraOptions
    hooks = Refactor
    shared_options = ("dropout", "rslora")

    def __init__(
        self, stored: StoredWeight, up_OK: Tensor, down_KI: Tensor, own: LoraOptions, *, scale: float, dropout: float
    ):
        super().__init__(stored, scale=scale, dropout=dropout)
        self.ratio, self.refactor_every = own.lora_plus_ratio, own.refactor_every
        self.up = nn.Parameter(up_OK)
        self.down = nn.Parameter(down_KI)

    @classmethod
    def start(cls, stored: StoredWeight, options: AdapterOptions, generator: torch.Generator) -> "Lora":
        rank, scale = cls.size(stored, options)
        out_features, in_features = stored.residual.shape
        down_KI = kaiming(rank, in_features, generator)
        device = stored.up_OR.device
        up_OK = torch.zeros(out_features, rank, dtype=options.torch_dtype, device=device)
        down_KI = down_KI.to(device, options.torch_dtype)
        return cls(stored, up_OK, down_KI, cls.own(options), scale=scale, dropout=options.dropout)

    @classmethod
    def tensors(
        cls, shape: tuple[int, int], stored_rank: int, rank: int, dtype: torch.dtype, stored_dtype: torch.dtype
    ) -> AdapterTensors:
        rank = min(rank, *shape)
        parameters = {"up": TensorShape((shape[0], rank), dtype), "down": TensorShape((rank, shape[1]), dtype)}
        return joined(shape, stored_rank, parameters, rank, (dtype, stored_dtype))

    def added(self) -> tuple[Tensor, Tensor]:
        return self.scale * self.up, self.down

    def pair(self) -> tuple[nn.Parameter, nn.Parameter]:
        return self.up, self.down

    def rates(self) -> Mapping[str, float]:
        return {"up": self.ratio} if self.ratio != 1 else {}

    def refactor(self) -> list[nn.Parameter]:
        found = product_svd(self.up, self.down)
        self.up.copy_(found.left_OK * found.values_K)
        self.down.copy_(found.right_KI)
        return [self.up, self.down]


METHOD = Lora
