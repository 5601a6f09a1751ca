"""Tensors that do not exist yet: their shapes, dtypes and bytes, and the bytes that an optimizer adds to them."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, prod

import torch
from torch import Tensor

from qsvd.errors import BadInput
from qsvd.plan.weights import WeightSpec

LEAST_8_BIT = 4096  # elements; bitsandbytes' min_8bit_size, below which state is float32
LEAST_PAGED = 100_000  # elements, from which bitsandbytes' paged optimizers page state
STATE_BLOCK = 256  # elements of 8-bit state that share a scale
LEVEL_BYTES = 2 * 4 * 256  # of two float32 tables, shared by all parameters
STEP_BYTES = 4  # torch counts the steps of each parameter in a float32 in CPU memory


@dataclass(frozen=True)
class TensorShape:
    """The shape and the dtype of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Family:
    """Weights of a model that have tensors in common. A method that has families makes a subclass of it.

    Args:
        name: Another one for each family of the model.
    """

    name: str


@dataclass(frozen=True)
class Layers:
    """The quantized layers of a model that can be trained, for a method that divides them into families.

    Args:
        specs: All of them; their order has no meaning.
        ranks: The stored ranks, by the paths of the layers.
        targets: Paths of the layers that are to be trained.
        head_size: Features of a head of attention; None if the config says none.
    """

    specs: Sequence[WeightSpec]
    ranks: Mapping[str, int]
    targets: Collection[str]
    head_size: int | None


@dataclass(frozen=True)
class AdapterTensors:
    """The tensors of the adapter of one weight, by name.

    Args:
        parameters: Trained.
        buffers: Frozen, without the residual.
        made: What a forward pass computes from these and keeps for the backward pass. The layer multiplies with "up",
            "down" and "gain"; those that are not in `made` are parameters or buffers themselves.
        shared: Frozen, and one tensor for all weights of the family with the same name and shape.
        common: Trained, and one tensor for all weights of the family.
        family: Name of the family; empty for all weights that have none.
        state: What the hooks of the method keep between steps.
        delta: Computes what a layer adds to its product, [T, O], from its input [T, I], the tensors above by name, and
            the dropout. None if nothing is added.
        numbers: With how many numbers `delta` multiplies each token, if they are as many as those of the weight.
        dropout: Above 0 and without `delta`, the frozen and the trained factors are multiplied apart, and nothing of
            `made` is made.
    """

    parameters: Mapping[str, TensorShape]
    buffers: Mapping[str, TensorShape]
    made: Mapping[str, TensorShape]
    shared: Mapping[str, TensorShape] = field(default_factory=dict)
    state: Mapping[str, TensorShape] = field(default_factory=dict)
    delta: Callable[[Tensor, Mapping[str, Tensor], float], Tensor] | None = None
    numbers: int = 0
    dropout: float = 0.0
    common: Mapping[str, TensorShape] = field(default_factory=dict)
    family: str = ""

    @property
    def trained(self) -> dict[str, TensorShape]:
        """What is trained of the weight alone, and with others."""
        return {**self.parameters, **self.common}


def total_bytes(tensors: Iterable[TensorShape]) -> int:
    """Return the bytes of all tensors."""
    return sum(tensor.num_bytes for tensor in tensors)


@dataclass(frozen=True)
class OptimizerBytes:
    """Bytes between steps on the device and on the host, and the additional bytes of a step on the device."""

    device: int
    host: int
    workspace: int


def optimizer_bytes(optimizer: str, parameters: Sequence[TensorShape], *, on_gpu: bool) -> OptimizerBytes:
    """Return what an optimizer keeps for these parameters.

    Args:
        optimizer: adamw, adamw_8bit, paged_adamw_8bit, paged_adamw_32bit or lora-rite. The state of paged ones counts
            on the device, where it is if it fits. Of lora-rite every matrix counts as a factor of a pair.

    Raises:
        BadInput: optimizer has another value.
    """
    if optimizer == "adamw":  # two moments, and roots of the second: all at once on a GPU, otherwise one by one
        roots = total_bytes(parameters) if on_gpu else 2 * max((tensor.num_bytes for tensor in parameters), default=0)
        return OptimizerBytes(2 * total_bytes(parameters), STEP_BYTES * len(parameters), _rounding(parameters, roots))
    if optimizer == "paged_adamw_32bit":
        return OptimizerBytes(sum(8 * tensor.numel for tensor in parameters), 0, _rounding(parameters))
    if optimizer in ("adamw_8bit", "paged_adamw_8bit"):
        has_levels = any(tensor.numel >= LEAST_8_BIT for tensor in parameters)
        state = sum(map(_state_8_bit, parameters)) + LEVEL_BYTES * has_levels
        return OptimizerBytes(state, 0, _rounding(parameters))
    if optimizer == "lora-rite":  # two tensors as large as the parameter, and of a factor the second moment [K, K]
        squares = sum(4 * min(tensor.shape) ** 2 for tensor in parameters if len(tensor.shape) == 2)
        copies = max(((5 + (tensor.dtype.itemsize < 4)) * 4 * tensor.numel for tensor in parameters), default=0)
        return OptimizerBytes(sum(8 * tensor.numel for tensor in parameters) + squares, 0, 2 * squares + copies)
    raise BadInput(
        f"optimizer {optimizer!r} is not one of adamw, adamw_8bit, paged_adamw_8bit, paged_adamw_32bit, lora-rite"
    )


def _rounding(parameters: Sequence[TensorShape], work: int = 0) -> int:
    """Return the bytes of a step with its stochastic rounding: values before it, and two float32 copies of one tensor.

    Args:
        work: Bytes of the optimizer's own.
    """
    short = [tensor for tensor in parameters if tensor.dtype.itemsize < 4]
    return total_bytes(short) + max([work, *(8 * tensor.numel for tensor in short)])


def small_state(optimizer: str, parameters: Sequence[TensorShape], *, on_gpu: bool) -> str | None:
    """Return a sentence if most trained tensors are below the sizes at which bitsandbytes compresses or pages state."""
    compressed = sum(tensor.numel < LEAST_8_BIT for tensor in parameters) if "8bit" in optimizer else 0
    paged = sum(tensor.numel < LEAST_PAGED for tensor in parameters) if "paged" in optimizer and on_gpu else 0
    found = []
    if 2 * compressed >= len(parameters):
        found.append(f"{compressed} have fewer than {LEAST_8_BIT:,} elements, so their state is kept in 32 bits")
    if 2 * paged >= len(parameters):
        found.append(f"{paged} have fewer than {LEAST_PAGED:,} elements, so their state is not paged")
    if not found:
        return None
    return f"Of {len(parameters)} trained tensors {'; '.join(found)} (rules of bitsandbytes)."


def _state_8_bit(tensor: TensorShape) -> int:
    if tensor.numel < LEAST_8_BIT:
        return 8 * tensor.numel
    return 2 * tensor.numel + 2 * 4 * ceil(tensor.numel / STATE_BLOCK)
