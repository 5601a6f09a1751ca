"""XGBLoRA: boosters of rank 1, trained one after the other on layers that are drawn. Shape suffixes as in adapter.py;
C = the most boosters that a weight keeps apart.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor, nn

from qsvd.adapters.adapter import AdapterOptions, Defaults, StoredWeight
from qsvd.adapters.methods.added import Added, joined
from qsvd.adapters.methods.hooks import Course, Hooks
from qsvd.memory.items import block_of
from qsvd.numerics.svd import product_svd
from qsvd.option_types import Help, at_least
from qsvd.plan.tensors import AdapterTensors, TensorShape


@dataclass(frozen=True, kw_only=True)
class XgbLoraOptions:
    """The options of XGBLoRA's own."""

    booster_steps: Annotated[int, at_least(1), Help("Steps that train one booster of each drawn layer; kappa.")] = 8
    booster_layers: Annotated[int, at_least(1), Help("Blocks that are drawn for each round of boosters; L_s.")] = 8


class _Boost(Hooks):
    """Ends a round of boosters after every kappa steps: keeps them, draws blocks, and starts new boosters there.

    Which blocks train follows from the seed and the number of the round, which is saved with every weight.
    """

    def __init__(self, adapters: Mapping[str, "XgbLora"], course: Course):
        super().__init__(adapters, course)
        first = next(iter(adapters.values()))
        self.every, self.count, self.seed = first.chosen.booster_steps, first.chosen.booster_layers, first.seed
        self.blocks = [*dict.fromkeys(block_of(path) for path in adapters)]
        self.round = int(first.get_buffer("round").item())
        self._draw()

    def _draw(self) -> None:
        order = torch.randperm(len(self.blocks), generator=_generator(self.seed, "blocks", self.round))
        drawn = {self.blocks[number] for number in order[: self.count].tolist()}
        for path, adapter in self.adapters.items():
            adapter.is_active = block_of(path) in drawn

    def after_step(self, step: int) -> None:
        if step % self.every:
            return
        self.round += 1
        for adapter in self.adapters.values():
            self.course.forget(adapter.begin(self.round))
        self._draw()


class XgbLora(Added):
    """XGBLoRA (arXiv:2410.19694, algorithm 1): W' = Q + B0 A0 + B' A' + (alpha / C) b a; the booster b a is trained.

    Every --booster-steps the booster is added to the kept ones, B' A', and the optimizer begins anew with the next one,
    from b = 0 and a of N(0, 1 / I), in --booster-layers blocks that are drawn. The authors add it to W; here W is
    quantized and stays. --rank is C, the most boosters that are kept as they are: more are reduced to the best
    approximation of rank C. Parameters: O + I. B' [O, C] and A' [C, I] are float32 and saved with them. Other trainers
    call no hooks: one booster of every layer is trained.
    """

    paper = "2410.19694"
    starts_as = "zero, added"
    defaults = Defaults(
        rank=32,
        scale=2.0,
        learning_rate=1e-4,
        reason="the authors' rate for Llama 3 8B; the scale, which they do not give, is LoRA's usual alpha = 2 rank",
    )
    options = XgbLoraOptions
    hooks = _Boost

    def __init__(self, stored: StoredWeight, options: AdapterOptions, generator: torch.Generator):
        rank, scale = self.size(stored, options)
        super().__init__(stored, scale=scale)
        self.frozen_rank = stored.rank + rank
        self.chosen, self.seed, self.name, self.is_active = self.own(options), options.seed, stored.name, True
        (rows, columns), device, dtype = stored.residual.shape, stored.up_OR.device, options.torch_dtype
        self.up = nn.Parameter(torch.zeros(rows, 1, dtype=dtype, device=device))
        self.down = nn.Parameter(_first(columns, generator).to(device, dtype))
        self.register_buffer("kept_up", torch.zeros(rows, rank, device=device))
        self.register_buffer("kept_down", torch.zeros(rank, columns, device=device))
        self.register_buffer("round", torch.zeros(1, dtype=torch.int64, device=device))

    @classmethod
    def start(cls, stored: StoredWeight, options: AdapterOptions, generator: torch.Generator) -> "XgbLora":
        return cls(stored, options, generator)

    @classmethod
    def tensors(
        cls, shape: tuple[int, int], stored_rank: int, rank: int, dtype: torch.dtype, stored_dtype: torch.dtype
    ) -> AdapterTensors:
        (rows, columns), rank = shape, min(rank, *shape)
        parameters = {"up": TensorShape((rows, 1), dtype), "down": TensorShape((1, columns), dtype)}
        found = joined(shape, stored_rank, parameters, rank + 1, (torch.float32, stored_dtype))
        kept = {
            "round": TensorShape((1,), torch.int64),
            "kept_up": TensorShape((rows, rank), torch.float32),
            "kept_down": TensorShape((rank, columns), torch.float32),
        }
        made = {**found.made, "down": TensorShape((stored_rank + rank + 1, columns), torch.float32)}
        return replace(found, buffers={**found.buffers, **kept}, made=made)

    def added(self) -> tuple[Tensor, Tensor]:
        up, down = (self.up, 1 * self.down) if self.is_active else (self.up.detach(), self.down.detach())
        kept_up, kept_down = self.get_buffer("kept_up"), self.get_buffer("kept_down")
        return torch.cat((kept_up, self.scale * up), dim=1), torch.cat((kept_down, down))

    @torch.no_grad()
    def keep(self) -> None:
        """Add the booster to the kept ones, and set it to zero."""
        if not self.up.any():
            return
        up, down = self.added()
        kept_up, rank = self.get_buffer("kept_up").clone(), up.shape[1] - 1
        kept_down, free = self.get_buffer("kept_down").clone(), int(kept_up.any(dim=0).sum())
        if free < rank:
            kept_up[:, free], kept_down[free] = up[:, rank], down[rank]
        else:
            kept_up, kept_down = product_svd(up, down).factors(rank, torch.float32)
        self.kept_up, self.kept_down = kept_up, kept_down
        self.up.zero_()

    @torch.no_grad()
    def begin(self, number: int) -> list[nn.Parameter]:
        """Keep the booster and start that of a round; return its parameters."""
        self.keep()
        self.round = torch.full_like(self.get_buffer("round"), number)
        self.down.copy_(_first(self.down.shape[1], _generator(self.seed, self.name, number)))
        return [self.up, self.down]

    def exported(self) -> tuple[Tensor, Tensor]:
        up_OK, down_KI = self.factors()
        kept = up_OK.any(dim=0)
        kept[: len(self.get_buffer("frozen_down"))] = True
        return up_OK[:, kept], down_KI[kept]


def _first(columns: int, generator: torch.Generator) -> Tensor:
    """Return the first a of a booster, float32 [1, I] on the CPU."""
    return torch.randn(1, columns, generator=generator) / columns**0.5


def _generator(seed: int, name: str, number: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {name} booster {number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:6]))


METHOD = XgbLora
