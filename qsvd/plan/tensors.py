"""Tensors that are not made yet: their shapes, dtypes and bytes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch


@dataclass(frozen=True)
class TensorShape:
    """One tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class AdapterTensors:
    """What the adapter of one weight consists of, by name.

    Args:
        parameters: Trained.
        buffers: Frozen, beside the residual.
        made: What a forward pass makes of these and keeps for the backward pass. "up", "down" and "gain" are what the
            layer multiplies with; where they are not made, they are the parameters or buffers themselves.
    """

    parameters: Mapping[str, TensorShape]
    buffers: Mapping[str, TensorShape]
    made: Mapping[str, TensorShape]


def total_bytes(tensors: Iterable[TensorShape]) -> int:
    """Bytes of all of them."""
    return sum(tensor.num_bytes for tensor in tensors)
