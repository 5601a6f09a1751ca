"""WeightLoRA: LoRA with a trained gate a layer, of which the largest are kept. Shape suffixes as in adapter.py."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor, nn

from qsvd.adapters.adapter import AdapterOptions, Defaults, StoredWeight
from qsvd.adapters.methods.added import kaiming
from qsvd.adapters.methods.hooks import Course, Hooks
from qsvd.adapters.methods.lora import Lora, LoraOptions
from qsvd.errors import BadInput
from qsvd.option_types import ABOVE_ZERO, Help, at_least
from qsvd.plan.tensors import AdapterTensors, TensorShape


@dataclass(frozen=True, kw_only=True)
class WeightLoraOptions:
    """The options of WeightLoRA's own."""

    keep_layers: Annotated[
        int | None, at_least(1), Help("Layers whose adapters are kept. Default: half of the trained ones.")
    ] = None
    gate_every: Annotated[int, at_least(1), Help("Steps between two choices of the layers to keep.")] = 10
    gate_rate: Annotated[float, ABOVE_ZERO, Help("Learning rate of the gates, which plain SGD trains.")] = 5.0
    grow: Annotated[
        int,
        at_least(0),
        Help("Choices that halve the layers and double the rank, up to --rank (WeightLoRA+). 0: --keep-layers."),
    ] = 0


class _Choose(Hooks):
    """Trains the gates by plain SGD, and keeps the layers whose gates are largest by magnitude.

    The gates' gradients are taken after clipping, as in the authors' code; the optimizer gets zeros, and what it does
    to a gate is undone. A layer that was dropped stays so: its gate and B are 0, and the optimizer leaves it alone.
    Everything follows from the parameters and the number of the step, so that a stopped run needs nothing else.
    """

    def __init__(self, adapters: Mapping[str, "WeightLora"], course: Course):
        super().__init__(adapters, course)
        self.own = next(iter(adapters.values())).gates
        gates = dict(zip(adapters, self._magnitudes([*adapters]), strict=True))
        self.active = [path for path, gate in gates.items() if gate]
        self.ranks = {path: adapter.rank_in_use() for path, adapter in adapters.items()} if self.own.grow else {}
        self.moved: dict[str, Tensor] = {}

    @property
    def _grows(self) -> bool:
        """Whether a choice is to come that doubles the ranks."""
        return any(self.ranks[path] < len(self.adapters[path].down) for path in self.ranks)

    @torch.no_grad()
    def transform_grads(self, step: int) -> None:
        del step
        rests = self.own.grow and not self._grows  # the authors train no gates after the last growth
        self.moved = {path: adapter.gate.clone() for path, adapter in self.adapters.items()}
        for path in self.active:
            gate = self.adapters[path].gate
            if gate.grad is not None and not rests:  # None: of an expert without tokens
                self.moved[path].sub_(gate.grad, alpha=self.own.gate_rate)
        active = {*self.active}
        for path, adapter in self.adapters.items():
            if adapter.gate.grad is not None:
                adapter.gate.grad.zero_()
            if path not in active:
                adapter.up.grad = adapter.down.grad = None

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        for path, gate in self.moved.items():
            self.adapters[path].gate.copy_(gate)
        for path, rank in self.ranks.items():  # what an optimizer's rounding made of the zeros
            self.adapters[path].up[:, rank:] = 0
            self.adapters[path].down[rank:] = 0
        if step % self.own.gate_every == 0 and (self._grows or not self.own.grow):
            self._choose()

    def _choose(self) -> None:
        values = self._magnitudes(self.active)
        if len({*values}) == 1:
            return  # the gates have not moved yet: B is still 0
        count = max(1, len(values) // 2) if self.own.grow else self.own.keep_layers or math.ceil(len(self.adapters) / 2)
        order = sorted(zip(values, self.active, strict=True), key=lambda one: -one[0])  # ties in model order
        kept = {path for _, path in order[:count]}
        for path in [path for path in self.active if path not in kept]:
            self.adapters[path].gate.zero_()
            self.adapters[path].up.zero_()
        self.active = [path for path in self.active if path in kept]
        self.ranks = {path: self._grown(path) for path in self.ranks if path in kept}

    def _grown(self, path: str) -> int:
        """Double the rank of an adapter and return it."""
        adapter, rank = self.adapters[path], self.ranks[path]
        wider = min(2 * rank, len(adapter.down))
        if wider > rank:
            adapter.grow(rank, wider)
            self.course.forget([adapter.up, adapter.down])
        return wider

    def _magnitudes(self, paths: list[str]) -> list[float]:
        return torch.cat([self.adapters[path].gate.detach().abs() for path in paths]).tolist()


class WeightLora(Lora):
    """WeightLoRA (arXiv:2506.02724): W' = Q + B0 A0 + w (alpha / K) B A, with a scalar gate w a weight, from w = 1.

    At a step that divides by --gate-every only --keep-layers gates are kept, the largest by magnitude; the others
    become 0 and stay 0. With --grow (WeightLoRA+) each of so many choices halves the layers and doubles the rank, which
    starts at K / 2^grow: with A^T = U R (QR) and random columns N,

        A <- [U, (I - U U^T) N]^T    B <- [B R^T, 0]

    which leaves B A as it is; the optimizer forgets both. Parameters: K (O + I) + 1. The scale stays alpha / K.
    """

    paper = "2506.02724"
    starts_as = "zero, added"
    defaults = Defaults(
        rank=8, scale=32 / 8, learning_rate=5e-4, reason="the authors' rank, alpha and rate for DeBERTaV3 on MRPC"
    )
    options = WeightLoraOptions
    shared_options = ("dropout",)
    hooks = _Choose

    def __init__(self, stored: StoredWeight, options: AdapterOptions, generator: torch.Generator):
        rank, scale = self.size(stored, options)
        (rows, columns), device, dtype = stored.residual.shape, stored.up_OR.device, options.torch_dtype
        own: WeightLoraOptions = self.own(options)
        down_KI = kaiming(rank, columns, generator)
        if own.grow:
            down_KI[self._first_rank(own, self.defaults.rank_of(options, stored.rank)) :] = 0
        up_OK = torch.zeros(rows, rank, dtype=dtype, device=device)
        down_KI = down_KI.to(device, dtype)
        super().__init__(stored, up_OK, down_KI, LoraOptions(), scale=scale, dropout=options.dropout)
        self.gate = nn.Parameter(torch.ones(1, device=device))  # float32: its steps vanish in bfloat16
        self.gates, self.seed = own, generator.initial_seed()

    @classmethod
    def start(cls, stored: StoredWeight, options: AdapterOptions, generator: torch.Generator) -> "WeightLora":
        return cls(stored, options, generator)

    @staticmethod
    def _first_rank(own: WeightLoraOptions, rank: int) -> int:
        if own.keep_layers is not None:
            raise BadInput("keep_layers has no use with grow, which halves the layers: give one of both")
        if rank >> own.grow < 1:
            raise BadInput(
                f"rank {rank} cannot be the double of another {own.grow} times (grow); give rank {2**own.grow} or more"
            )
        return rank >> own.grow

    @classmethod
    def tensors(
        cls, shape: tuple[int, int], stored_rank: int, rank: int, dtype: torch.dtype, stored_dtype: torch.dtype
    ) -> AdapterTensors:
        found = super().tensors(shape, stored_rank, rank, dtype, stored_dtype)
        return replace(found, parameters={**found.parameters, "gate": TensorShape((1,), torch.float32)})

    @classmethod
    def kept(cls, own: WeightLoraOptions, shape: tuple[int, int]) -> Mapping[str, TensorShape]:  # pyright: ignore[reportIncompatibleMethodOverride]
        del own, shape
        return {}

    def added(self) -> tuple[Tensor, Tensor]:
        return self.up * (self.scale * self.gate), self.down

    def exported(self) -> tuple[Tensor, Tensor]:
        up_OK, down_KI = self.factors()
        in_use = self.down.any(dim=1) & self.gate.bool()
        kept = torch.cat((in_use.new_ones(self.frozen_rank), in_use))
        return up_OK[:, kept], down_KI[kept]

    def rank_in_use(self) -> int:
        """Return how many rows of A are not 0: the rank so far, with `grow`."""
        return int(self.down.any(dim=1).sum())

    @torch.no_grad()
    def grow(self, rank: int, wider: int) -> None:
        """Widen the product from this rank to another, at most twice as high and within the tensors, unchanged."""
        columns = self.down.shape[1]
        basis_IK, triangle_KK = torch.linalg.qr(self.down[:rank].double().T)
        generator = torch.Generator().manual_seed(self.seed + rank)
        new_KI = kaiming(wider - rank, columns, generator).to(basis_IK)
        new_KI -= new_KI @ basis_IK @ basis_IK.T
        self.up[:, :rank] = (self.up[:, :rank].double() @ triangle_KK.T).to(self.up.dtype)
        self.down[:wider] = torch.cat((basis_IK.T, new_KI)).to(self.down.dtype)


METHOD = WeightLora
