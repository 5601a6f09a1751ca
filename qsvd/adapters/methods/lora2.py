"""LoRA^2: AdaLoRA's triplets between two thin factors. Shape suffixes as in adapter.py, and S = inner size."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from qsvd.adapters.adapter import AdapterOptions, Defaults, Family, StoredWeight
from qsvd.adapters.methods.adalora import DEVIATION, AdaLoraOptions, Allocate, moments_of, target_rank
from qsvd.adapters.methods.added import Added, joined
from qsvd.option_types import Help, at_least
from qsvd.plan.tensors import AdapterTensors, TensorShape


@dataclass(frozen=True, kw_only=True)
class Lora2Options(AdaLoraOptions):
    """The options of LoRA^2's own."""

    inner_size: Annotated[int | None, at_least(1), Help("Rank of the outer factors. Default: --rank.")] = None


class Lora2(Added):
    """LoRA^2 (arXiv:2408.06854): W' = Q + B0 A0 + (alpha / K) B b diag(E) a A, with all five trained, from E = 0.

    B [O, S] and A [S, I] are the outer factors, b [S, K] and a [K, S] the inner ones; S is --inner-size, 8 in the
    authors' code. AdaLoRA's budget removes values of E, by scores of E, a and b alone. As in that code A A^T, a^T a,
    b b^T and B^T B are kept near I; its last term, |a A B b|, has no gradient there and is left out. Parameters:
    S (O + I) + 2 S K + K. The export has at most min(K, S) columns; removed values leave it.
    """

    paper = "2408.06854"
    starts_as = "zero, added"
    defaults = Defaults(
        rank=8, scale=16 / 8, learning_rate=5e-4, reason="the authors' rank, alpha and rate for DeBERTaV3 on MNLI"
    )
    options = Lora2Options
    hooks = Allocate
    scored: ClassVar[Mapping[str, int]] = MappingProxyType({"inner_down": 0, "inner_up": 1})
    orthonormal: ClassVar[Mapping[str, int]] = MappingProxyType({"down": 0, "inner_down": 1, "inner_up": 0, "up": 1})

    def __init__(self, stored: StoredWeight, options: AdapterOptions, generator: torch.Generator):
        rank, scale = self.size(stored, options)
        super().__init__(stored, scale=scale)
        self.chosen = self.own(options)
        self.target_rank = target_rank(self.chosen, self.defaults.rank_of(options, stored.rank), rank)
        device, dtype = stored.up_OR.device, options.torch_dtype
        shapes = shapes_of(stored.residual.shape, rank, self.chosen.inner_size)
        drawn = {
            part: torch.empty(shape).normal_(0, DEVIATION, generator=generator).to(device, dtype)
            for part, shape in shapes.items()
            if part != "diagonal"
        }
        self.up, self.inner_up = nn.Parameter(drawn["up"]), nn.Parameter(drawn["inner_up"])
        self.diagonal = nn.Parameter(torch.zeros(rank, dtype=dtype, device=device))
        self.inner_down, self.down = nn.Parameter(drawn["inner_down"]), nn.Parameter(drawn["down"])

    @classmethod
    def start(cls, stored: StoredWeight, options: AdapterOptions, generator: torch.Generator) -> "Lora2":
        return cls(stored, options, generator)

    @classmethod
    def tensors(
        cls, shape: tuple[int, int], stored_rank: int, rank: int, dtype: torch.dtype, stored_dtype: torch.dtype
    ) -> AdapterTensors:
        return cls.planned(AdapterOptions(), None, shape, stored_rank, rank, dtype, stored_dtype)

    @classmethod
    def planned(cls, options: AdapterOptions, family: Family | None, *sizes: Any) -> AdapterTensors:
        del family
        shape, stored_rank, rank, dtype, stored_dtype = sizes
        rank = min(rank, *shape)
        shapes = shapes_of(shape, rank, cls.own(options).inner_size)
        parameters = {part: TensorShape(size, dtype) for part, size in shapes.items()}
        inner = shapes["inner_up"][0]
        found = joined(shape, stored_rank, parameters, min(rank, inner), (dtype, stored_dtype))
        made = {**found.made, "scaled": TensorShape((rank,), dtype), "left": TensorShape((inner, rank), dtype)}
        if inner <= rank:
            made["core"] = TensorShape((inner, inner), dtype)
        else:
            made["down"] = TensorShape((stored_rank + rank, shape[1]), dtype)
        moved = {part: shapes[part] for part in ("diagonal", *cls.scored)}
        return AdapterTensors(parameters, found.buffers, made, state=moments_of(moved))

    def added(self) -> tuple[Tensor, Tensor]:
        return self._product(self.inner_up, self.diagonal, self.inner_down)

    def _product(self, up_SK: Tensor, values_K: Tensor, down_KS: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors of the product with these inner ones, of the smaller of both ranks."""
        left_SK = up_SK * (self.scale * values_K)
        if len(up_SK) <= len(values_K):
            return self.up @ (left_SK @ down_KS), self.down
        return self.up @ left_SK, down_KS @ self.down

    def exported(self) -> tuple[Tensor, Tensor]:
        kept = self.diagonal != 0
        up_OK, down_KI = self._product(self.inner_up[:, kept], self.diagonal[kept], self.inner_down[kept])
        up_OR, down_RI = self.get_buffer("frozen_up"), self.get_buffer("frozen_down")
        return torch.cat((up_OR.to(up_OK), up_OK), dim=1), torch.cat((down_RI.to(down_KI), down_KI))


def shapes_of(shape: tuple[int, int], rank: int, inner_size: int | None) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters of an [O, I] weight; the inner size is cut to its smaller side."""
    inner = min(rank if inner_size is None else inner_size, *shape)
    return {
        "up": (shape[0], inner),
        "inner_up": (inner, rank),
        "diagonal": (rank,),
        "inner_down": (rank, inner),
        "down": (inner, shape[1]),
    }


METHOD = Lora2
