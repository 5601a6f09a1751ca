"""Tensors of a checkpoint that lies nowhere: their values are made each time they are asked for."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class DrawnEntry:
    """One tensor that is made when it is read, always with the same values, on a device of its maker's choice."""

    name: str
    dtype: str  # as safetensors spells it, "BF16"
    shape: tuple[int, ...]
    num_bytes: int
    make: Callable[[], Tensor] = field(repr=False, compare=False)
