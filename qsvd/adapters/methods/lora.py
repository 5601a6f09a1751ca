"""LoRA, and QLoRA where no components are stored. Shape suffixes as in adapter.py."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from qsvd.adapters.adapter import AdapterOptions, Defaults, StoredWeight
from qsvd.adapters.methods.added import Added, joined, kaiming
from qsvd.adapters.methods.hooks import Course, Hooks
from qsvd.adapters.methods.refactor import Refactor, RefactorOptions
from qsvd.numerics.svd import product_svd
from qsvd.option_types import ABOVE_ZERO, SHARE, Help, at_least
from qsvd.plan.tensors import AdapterTensors, TensorShape

MEMORY = 0.9  # of the running mean of the inputs' norms: the paper's is not known to us


@dataclass(frozen=True, kw_only=True)
class LoraOptions(RefactorOptions):
    """The options of LoRA's own."""

    lora_plus_ratio: Annotated[
        float, ABOVE_ZERO, Help("Learning rate of B over that of A; 16 is LoRA+ (arXiv:2402.12354).")
    ] = 1.0
    rank_end: Annotated[
        int | None,
        at_least(1),
        Help("Rank in the last block; ranks are linear in depth, from --rank in the first (PRILoRA). Default: --rank."),
    ] = None
    prune_every: Annotated[
        int | None, at_least(1), Help("Steps between two prunings of A (PRILoRA). Default: A is not pruned.")
    ] = None
    prune_share: Annotated[float, SHARE, Help("Share of each row of A that a pruning sets to zero.")] = 0.5


class Prune(Hooks):
    """Sets the least important entries of each row of A to zero after every --prune-every steps (PRILoRA).

    The importance of A_ij is |A_ij| times the running mean of ||x_j||, the norm of an input over all tokens of a step,
    as in Wanda (arXiv:2306.11695). Zeros have gradients and may grow again. Nothing is done without --prune-every.
    """

    def __init__(self, adapters: Mapping[str, "Lora"], course: Course):
        super().__init__(adapters, course)
        own = next(iter(adapters.values())).chosen
        self.every, self.share = own.prune_every, own.prune_share
        self.norms: dict[str, Tensor] = {}
        if self.every:
            for path, adapter in adapters.items():
                adapter.squares = torch.zeros(adapter.down.shape[1], device=adapter.down.device)
                adapter.looks = True
                self.norms[path] = torch.zeros_like(adapter.squares)

    def looked(self) -> list[Tensor]:
        return [self.adapters[path].squares for path in self.norms]

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        for path, norms_I in self.norms.items():
            adapter = self.adapters[path]
            norms_I.lerp_(adapter.squares.sqrt(), 1 - MEMORY)
            adapter.squares.zero_()
            if self.every and step % self.every == 0 and norms_I.any():  # an expert may have had no token
                down_KI = adapter.down
                count = int(self.share * down_KI.shape[1])
                least = (down_KI.float().abs() * norms_I).topk(count, dim=1, largest=False).indices
                down_KI.scatter_(1, least, 0)

    def end(self) -> None:
        for adapter in self.adapters.values():
            adapter.looks = False

    def state(self) -> dict[str, Tensor]:
        squares = {f"{path} squares": self.adapters[path].squares for path in self.norms}
        return {f"{path} norms": norms_I for path, norms_I in self.norms.items()} | squares

    def restore(self, state: Mapping[str, Tensor]) -> None:
        for name, tensor in self.state().items():
            tensor.copy_(state[name])


class LoraHooks(Hooks):
    """Prunes A, and replaces the factors, if the options say so."""

    def __init__(self, adapters: Mapping[str, "Lora"], course: Course):
        super().__init__(adapters, course)
        self.prune, self.refactor = Prune(adapters, course), Refactor(adapters, course)

    def looked(self) -> list[Tensor]:
        return self.prune.looked()

    def after_step(self, step: int) -> None:
        self.prune.after_step(step)
        self.refactor.after_step(step)

    def end(self) -> None:
        self.prune.end()

    def state(self) -> dict[str, Tensor]:
        return self.prune.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.prune.restore(state)


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
    hooks = LoraHooks
    squares: Tensor  # the sums of x_j^2 so far, with Prune
    shared_options = ("dropout", "rslora")

    def __init__(
        self, stored: StoredWeight, up_OK: Tensor, down_KI: Tensor, own: LoraOptions, *, scale: float, dropout: float
    ):
        super().__init__(stored, scale=scale, dropout=dropout)
        self.chosen, self.ratio, self.refactor_every = own, own.lora_plus_ratio, own.refactor_every
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
    def kept(cls, own: LoraOptions, shape: tuple[int, int]) -> Mapping[str, TensorShape]:
        norms = TensorShape((shape[1],), torch.float32)
        return {"norms": norms, "squares": norms} if own.prune_every else {}

    @classmethod
    def tensors(
        cls, shape: tuple[int, int], stored_rank: int, rank: int, dtype: torch.dtype, stored_dtype: torch.dtype
    ) -> AdapterTensors:
        rank = min(rank, *shape)
        parameters = {"up": TensorShape((shape[0], rank), dtype), "down": TensorShape((rank, shape[1]), dtype)}
        return joined(shape, stored_rank, parameters, rank, (dtype, stored_dtype))

    def added(self) -> tuple[Tensor, Tensor]:
        return self.scale * self.up, self.down

    def look(self, x_TI: Tensor) -> None:
        self.squares += torch.linalg.vector_norm(x_TI, dim=0, dtype=torch.float32).square_()

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
