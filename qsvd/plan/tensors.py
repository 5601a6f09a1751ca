"""Tensors that are not made yet: their shapes, dtypes and bytes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod

import torch

from qsvd.errors import BadInput


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


# Bytes that an optimizer keeps and needs for a step, by its name in qsvd.


LEAST_8_BIT = 4096  # elements; bitsandbytes' min_8bit_size, below which state is float32
STATE_BLOCK = 256  # elements of 8-bit state that share a scale
LEVELS = 2 * 4 * 256  # bytes; two tables of float32, shared by all parameters
STEP = 4  # bytes; torch counts the steps of each parameter in a float32 on the host


@dataclass(frozen=True)
class OptimizerBytes:
    """Bytes between steps, on the device and on the host, and what a step needs beside them on the device."""

    device: int
    host: int
    workspace: int


def optimizer_bytes(optimizer: str, parameters: Sequence[TensorShape], *, on_gpu: bool) -> OptimizerBytes:
    """What AdamW needs for these parameters.

    Args:
        optimizer: adamw, adamw_8bit, paged_adamw_8bit or paged_adamw_32bit. The state of paged ones counts as the
            device's, where it is whenever it fits.

    Raises:
        BadInput: another optimizer.
    """
    if optimizer == "adamw":
        return _torch_adamw(parameters, on_gpu=on_gpu)
    if optimizer == "paged_adamw_32bit":
        return OptimizerBytes(sum(8 * tensor.numel for tensor in parameters), 0, 0)
    if optimizer in ("adamw_8bit", "paged_adamw_8bit"):
        has_levels = any(tensor.numel >= LEAST_8_BIT for tensor in parameters)
        return OptimizerBytes(sum(map(_state_8_bit, parameters)) + LEVELS * has_levels, 0, 0)
    raise BadInput(f"optimizer {optimizer!r} is none of adamw, adamw_8bit, paged_adamw_8bit, paged_adamw_32bit")


def _torch_adamw(parameters: Sequence[TensorShape], *, on_gpu: bool) -> OptimizerBytes:
    """Two moments in the dtype of each parameter, and roots of the second: of all at once on a GPU, else one by one."""
    roots = total_bytes(parameters) if on_gpu else 2 * max((tensor.num_bytes for tensor in parameters), default=0)
    return OptimizerBytes(2 * total_bytes(parameters), STEP * len(parameters), roots)


def _state_8_bit(tensor: TensorShape) -> int:
    if tensor.numel < LEAST_8_BIT:
        return 8 * tensor.numel
    return 2 * tensor.numel + 2 * 4 * ceil(tensor.numel / STATE_BLOCK)
