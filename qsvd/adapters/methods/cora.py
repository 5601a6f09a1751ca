"""CoRA: LoRA on a basis that all layers of one kind have in common. Shape suffixes as in adapter.py."""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from qsvd.adapters.adapter import AdapterOptions, Defaults, StoredWeight, frozen_shapes
from qsvd.adapters.methods.added import Added
from qsvd.errors import BadInput
from qsvd.numerics.svd import shared_directions
from qsvd.option_types import Help
from qsvd.plan.tensors import AdapterTensors, Family, Layers, TensorShape


@dataclass(frozen=True, kw_only=True)
class CoraOptions:
    """The options of CoRA's own."""

    train_basis: Annotated[bool, Help("Train the basis of each layer, too; it starts as the common one.")] = False


@dataclass(frozen=True)
class Kind(Family):
    """The layers of one kind, such as all q_proj.

    Args:
        rows: Out features of each.
        directions: The most that their components have: the sum of their stored ranks.
        modules: Paths of the layers, trained or not.
    """

    rows: int
    directions: int
    modules: tuple[str, ...]


class Cora(Added):
    """CoRA (arXiv:2409.02119): W' = Q + B0 A0 + (alpha / K) U A, with A [K, I] trained from 0.

    U [O, K] has the leading left singular vectors of the components B0 A0 of all layers of its kind, side by side. It
    is frozen, one for the kind, in the dtype of the components, and saved with A; or it is trained, one for each layer
    (--train-basis). K is cut to the directions that the components of the kind have. A kind without components stays
    frozen. Parameters: K I, or K (O + I). The abstract alone was read: what the paper decomposes may differ.
    """

    paper = "2409.02119"
    starts_as = "zero, added"
    defaults = Defaults(
        rank=64, scale=16 / 64, learning_rate=2e-4, reason="those of lora: A moves here as B does there; not measured"
    )
    options = CoraOptions
    shared_options = ("rslora",)
    in_common = ("basis",)

    def __init__(self, stored: StoredWeight, basis_OK: Tensor, options: AdapterOptions, scale: float):
        super().__init__(stored, scale=scale)
        dtype, rank = options.torch_dtype, basis_OK.shape[1]
        self.up = nn.Parameter(basis_OK.to(dtype, copy=True)) if self.own(options).train_basis else None
        if self.up is None:
            self.family = stored.family.name if stored.family else ""
            self.register_buffer("basis", basis_OK)
        self.down = nn.Parameter(torch.zeros(rank, stored.residual.shape[1], dtype=dtype, device=basis_OK.device))

    @classmethod
    def families(cls, layers: Layers, options: AdapterOptions) -> Mapping[str, Kind]:
        directions = Counter[tuple[str, int]]()
        modules: dict[tuple[str, int], list[str]] = {}
        keys = {spec.module: (re.sub(r"\b\d+\b", "*", spec.module), spec.shape[0]) for spec in layers.specs}
        for module, key in keys.items():
            directions[key] += layers.ranks[module]
            modules.setdefault(key, []).append(module)
        kinds = {
            key: Kind(f"{key[0]} {key[1]}", key[1], directions[key], tuple(sorted(names)))
            for key, names in modules.items()
            if directions[key]
        }
        found = {module: kinds[key] for module, key in keys.items() if module in layers.targets and key in kinds}
        if not found:
            raise no_directions(options.method or "cora")
        return found

    @classmethod
    def common(
        cls,
        family: Kind,
        options: AdapterOptions,
        components: Callable[[str], tuple[Tensor, Tensor]] | None,
        like: Tensor,
    ) -> Mapping[str, Tensor]:
        rank = _rank(options, family.rows, family.directions)
        if components is None:
            return {"basis": like.new_zeros(family.rows, rank)}
        return {"basis": shared_directions(map(components, family.modules), rank).to(like)}

    @classmethod
    def start(cls, stored: StoredWeight, options: AdapterOptions, generator: torch.Generator) -> "Cora":
        del generator  # nothing is drawn
        basis_OK = stored.common.get("basis")
        if basis_OK is None:
            alone = Kind("", stored.residual.shape[0], stored.rank, ("",))
            if not stored.rank:
                raise no_directions(options.method or "cora")
            basis_OK = cls.common(alone, options, lambda _: (stored.up_OR, stored.down_RI), stored.up_OR)["basis"]
        return cls(stored, basis_OK, options, cls.defaults.rank_and_scale(options, stored.rank)[1])

    @classmethod
    def tensors(
        cls, shape: tuple[int, int], stored_rank: int, rank: int, dtype: torch.dtype, stored_dtype: torch.dtype
    ) -> AdapterTensors:
        return cls.planned(AdapterOptions(), None, shape, stored_rank, rank, dtype, stored_dtype)

    @classmethod
    def planned(cls, options: AdapterOptions, family: Kind | None, *sizes: Any) -> AdapterTensors:
        (rows, columns), stored_rank, rank, dtype, stored_dtype = sizes
        rank = min(rank, rows, family.directions if family else stored_rank)
        is_trained = cls.own(options).train_basis
        basis, both = {"basis": TensorShape((rows, rank), stored_dtype)}, stored_rank + rank
        parameters = {"down": TensorShape((rank, columns), dtype)}
        if is_trained:
            parameters = {"up": TensorShape((rows, rank), dtype), **parameters}
        made = {"down": TensorShape((both, columns), dtype)}
        if stored_rank:
            made["up"] = TensorShape((rows, both), dtype if is_trained else stored_dtype)
        return AdapterTensors(
            parameters=parameters,
            buffers=frozen_shapes((rows, columns), stored_rank, stored_dtype),
            made=made,
            shared={} if is_trained else basis,
            family=family.name if family else "",
        )

    def added(self) -> tuple[Tensor, Tensor]:
        return self.up if self.up is not None else self.get_buffer("basis"), self.scale * self.down

    def factors(self) -> tuple[Tensor, Tensor]:
        if self.up is not None:
            return super().factors()
        basis_OK, down_KI = self.added()
        frozen_up, frozen_down = self.get_buffer("frozen_up"), self.get_buffer("frozen_down")
        if not len(frozen_down):
            return basis_OK, down_KI
        return torch.cat((frozen_up, basis_OK), dim=1), torch.cat((frozen_down.to(down_KI), down_KI))


def _rank(options: AdapterOptions, rows: int, directions: int) -> int:
    rank, _ = Cora.defaults.rank_and_scale(options, 0)
    if rank < 1:
        raise BadInput(f"rank {rank} is below 1, the least that trains anything")
    return min(rank, rows, directions)


def no_directions(method: str) -> BadInput:
    """Return the refusal of a model without components."""
    return BadInput(
        f"{method} takes its bases from the stored components, and the layers to train have none (rank 0); quantize "
        "with --rank above 0, or use --method lora"
    )


METHOD = Cora
