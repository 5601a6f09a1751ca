"""A product that is added to the stored components: W' = Q + B0 A0 + B A, with B A = 0 at the start.

Shape suffixes as in adapter.py.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qsvd.adapters.adapter import Adapter, AdapterOptions, Defaults, StoredWeight, frozen_shapes
from qsvd.errors import BadInput, listing
from qsvd.plan.tensors import AdapterTensors, TensorShape


class Added(Adapter):
    """Keeps the components B0 and A0 frozen; a subclass trains the added factors, which `added` returns."""

    def __init__(self, stored: StoredWeight, *, scale: float, dropout: float = 0.0):
        super().__init__()
        self.scale = scale
        self.dropout = dropout
        self.frozen_rank = stored.rank
        self.register_buffer("frozen_up", stored.up_OR, persistent=False)
        self.register_buffer("frozen_down", stored.down_RI, persistent=False)

    @abstractmethod
    def added(self) -> tuple[Tensor, Tensor]:
        """Return the added factors, up [O, K] and down [K, I], with the scale in up."""

    def factors(self) -> tuple[Tensor, Tensor]:
        (frozen_up, frozen_down), (up_OK, down_KI) = self.divided()
        if not len(frozen_down):
            return up_OK, down_KI
        if down_KI.requires_grad:
            down_KI = 1 * down_KI  # else its gradient is a view that keeps the frozen part's alive
        return torch.cat((frozen_up.to(up_OK), up_OK), dim=1), torch.cat((frozen_down.to(down_KI), down_KI))

    def divided(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        return (self.get_buffer("frozen_up"), self.get_buffer("frozen_down")), self.added()

    @classmethod
    def size(cls, stored: StoredWeight, options: AdapterOptions) -> tuple[int, float]:
        """Return the trained rank, cut to the smaller side of the weight (a higher one adds nothing), and the scale."""
        return size_of(cls.defaults, stored, options)


def size_of(defaults: Defaults, stored: StoredWeight, options: AdapterOptions) -> tuple[int, float]:
    """Return the same for a method with these defaults."""
    rank, scale = defaults.rank_and_scale(options, stored.rank)
    if rank < 1:
        raise BadInput(f"rank {rank} is below 1, the least that trains anything")
    return min(rank, *stored.residual.shape), scale


class AddedBySize(Added):
    """An Added adapter whose shapes depend on options of its own: a subclass says them in `tensors_for`."""

    @classmethod
    def tensors(
        cls, shape: tuple[int, int], stored_rank: int, rank: int, dtype: torch.dtype, stored_dtype: torch.dtype
    ) -> AdapterTensors:
        return cls.tensors_for(cls.options(), shape, stored_rank, rank, (dtype, stored_dtype))

    @classmethod
    @abstractmethod
    def tensors_for(
        cls, own: Any, shape: tuple[int, int], stored_rank: int, rank: int, dtypes: tuple[torch.dtype, torch.dtype]
    ) -> AdapterTensors:
        """Return the shapes of what `start` makes with these options."""


def check_divides(
    method: str, divisors: Mapping[str, tuple[int, tuple[int, ...]]], shapes: Mapping[str, tuple[int, int]]
) -> None:
    """Refuse numbers that do not divide the sides of every layer, by BadInput with all of these layers.

    Args:
        divisors: By the name of the option: its value, and the sides that it must divide, 0 for O and 1 for I.
        shapes: [O, I] of the layers to train, by their paths.
    """
    wrong = []
    for option, (divisor, sides) in divisors.items():
        bad = [name for name, shape in shapes.items() if any(shape[side] % divisor for side in sides)]
        if bad:
            flag = f"--{option.replace('_', '-')}"
            most = math.gcd(*(shape[side] for shape in shapes.values() for side in sides))
            named = listing([f"{name} ({shapes[name][0]} x {shapes[name][1]})" for name in bad])
            what = "both sides" if len(sides) == 2 else ("the outputs", "the inputs")[sides[0]]
            wrong.append(
                f"{flag} {divisor} does not divide {what} of {len(bad)} of {len(shapes)} layers (out x in): "
                f"{named}; set {flag} to a divisor of {most}"
            )
    if wrong:
        raise BadInput(f"{method}: {'; '.join(wrong)}; or train other layers (--target-modules)")


def kaiming(rank: int, columns: int, generator: torch.Generator) -> Tensor:
    """Return A as LoRA and PEFT draw it: Kaiming's uniform bound with a = sqrt 5, float32 [K, I] on the CPU."""
    bound = 1 / math.sqrt(columns)
    return torch.empty(rank, columns).uniform_(-bound, bound, generator=generator)


def joined(
    shape: tuple[int, int],
    stored_rank: int,
    parameters: Mapping[str, TensorShape],
    rank: int,
    dtypes: tuple[torch.dtype, torch.dtype],
) -> AdapterTensors:
    """Return the tensors of an Added adapter with these parameters, whose trained rank is K.

    Args:
        dtypes: Of what is trained, and of the components.
    """
    (rows, columns), (dtype, stored_dtype) = shape, dtypes
    both = stored_rank + rank
    made = {"up": TensorShape((rows, both), dtype)}  # scaled, and joined with the frozen ones
    if stored_rank:
        made["down"] = TensorShape((both, columns), dtype)
    return AdapterTensors(parameters, frozen_shapes(shape, stored_rank, stored_dtype), made)
