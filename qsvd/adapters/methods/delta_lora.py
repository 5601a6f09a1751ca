"""Delta-LoRA: LoRA whose steps also move the frozen weight. Shape suffixes as in adapter.py."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from qsvd.adapters.adapter import AdapterOptions, Defaults, StoredWeight
from qsvd.adapters.methods.added import Added, joined, kaiming
from qsvd.adapters.methods.hooks import Course, Hooks
from qsvd.option_types import FROM_ZERO, SHARE, Help
from qsvd.plan.tensors import AdapterTensors, TensorShape


@dataclass(frozen=True, kw_only=True)
class DeltaLoraOptions:
    """The options of Delta-LoRA's own."""

    delta_ratio: Annotated[
        float, FROM_ZERO, Help("How far the weight moves with each step of B A, over that step; lambda.")
    ] = 2.0
    delta_start: Annotated[float, SHARE, Help("Share of the steps before the weight begins to move.")] = 0.1


class _Begin(Hooks):
    """Keeps the factors after the last step of LoRA alone, from which the weight moves with them."""

    def __init__(self, adapters: Mapping[str, "DeltaLora"], course: Course):
        super().__init__(adapters, course)
        self.last = int(next(iter(adapters.values())).chosen.delta_start * course.steps)
        self.after_step(0)

    def after_step(self, step: int) -> None:
        if step == self.last:
            for adapter in self.adapters.values():
                adapter.begin()


class _Graded(Function):
    """The same values; their gradient is multiplied by a share."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, share: float) -> Tensor:
        ctx.share = share
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.share * gradients[0], None


class DeltaLora(Added):
    """Delta-LoRA (arXiv:2309.02411, algorithm 1): W' = Q + B0 A0 + s B A + lambda s (B A - B1 A1), with s = alpha / K.

    The authors add lambda s (B A - the B A before) to W after every step. The sums leave what stands above, with B1 and
    A1 the factors when W began to move, so that Q stays as it is. W is no part of the gradient: the factors are
    multiplied by (1 + lambda) s in the forward pass and have the gradients of s B A. Parameters: K (O + I). B1 and A1
    are saved with them, and whether W moves. Other trainers call no hooks: with them W moves from the first step, with
    --delta-start 0, or never.
    """

    paper = "2309.02411"
    starts_as = "zero, added"
    defaults = Defaults(
        rank=64,
        scale=16 / 64,
        learning_rate=1e-4,
        reason="the rank and scale of lora; half its rate, since each step of B A counts up to three times",
    )
    options = DeltaLoraOptions
    hooks = _Begin
    shared_options = ("rslora",)

    def __init__(self, stored: StoredWeight, up_OK: Tensor, down_KI: Tensor, own: DeltaLoraOptions, *, scale: float):
        super().__init__(stored, scale=scale)
        self.chosen = own
        self.frozen_rank = stored.rank + len(down_KI)
        self.up, self.down = nn.Parameter(up_OK), nn.Parameter(down_KI)
        self.register_buffer("begun_up", torch.zeros_like(up_OK))
        self.register_buffer("begun_down", torch.zeros_like(down_KI))
        self.moves = own.delta_start == 0  # from B1 A1 = 0
        self.register_buffer("begun", torch.full((1,), float(self.moves), device=up_OK.device))

    @classmethod
    def start(cls, stored: StoredWeight, options: AdapterOptions, generator: torch.Generator) -> "DeltaLora":
        rank, scale = cls.size(stored, options)
        rows, columns = stored.residual.shape
        device, dtype = stored.up_OR.device, options.torch_dtype
        down_KI = kaiming(rank, columns, generator).to(device, dtype)
        up_OK = torch.zeros(rows, rank, dtype=dtype, device=device)
        return cls(stored, up_OK, down_KI, cls.own(options), scale=scale)

    @classmethod
    def tensors(
        cls, shape: tuple[int, int], stored_rank: int, rank: int, dtype: torch.dtype, stored_dtype: torch.dtype
    ) -> AdapterTensors:
        rank = min(rank, *shape)
        up, down = TensorShape((shape[0], rank), dtype), TensorShape((rank, shape[1]), dtype)
        found = joined(shape, stored_rank, {"up": up, "down": down}, 2 * rank, (dtype, stored_dtype))
        begun = {"begun_up": up, "begun_down": down, "begun": TensorShape((1,), torch.float32)}
        return replace(
            found,
            buffers={**found.buffers, **begun},
            made={**found.made, "down": TensorShape((stored_rank + 2 * rank, shape[1]), dtype)},
        )

    def begin(self) -> None:
        """Let the weight move from here, if it does not move yet."""
        if not self.moves:
            self.begun_up, self.begun_down = self.up.detach().clone(), self.down.detach().clone()
            self.begun = torch.ones_like(self.get_buffer("begun"))
            self.moves = True

    def forget(self) -> None:
        self.moves = bool(self.get_buffer("begun").item())

    def added(self) -> tuple[Tensor, Tensor]:
        ratio = self.chosen.delta_ratio if self.moves else 0.0
        up_OK, down_KI = (_Graded.apply(factor, 1 / (1 + ratio)) for factor in (self.up, self.down))
        begun_up, begun_down = self.get_buffer("begun_up"), self.get_buffer("begun_down")
        whole = (-ratio * self.scale * begun_up, (1 + ratio) * self.scale * up_OK)
        return torch.cat(whole, dim=1), torch.cat((begun_down, down_KI))

    def pair(self) -> tuple[nn.Parameter, nn.Parameter]:
        return self.up, self.down

    def exported(self) -> tuple[Tensor, Tensor]:
        up_OK, down_KI = self.factors()
        kept = torch.ones(len(down_KI), dtype=torch.bool)
        if not self.moves or not self.get_buffer("begun_up").any():
            kept[self.frozen_rank - len(self.down) : self.frozen_rank] = False
        return up_OK[:, kept], down_KI[kept]


METHOD = DeltaLora
