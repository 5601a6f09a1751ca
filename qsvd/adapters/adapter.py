"""What is trained beside a frozen residual: the interface of every method.

A method is one file with a subclass of Adapter, and one line in methods.py. Its trained numbers are nn.Parameters;
what it keeps frozen are buffers, which come from the base again and are not saved.

Shape suffixes: O = out features, I = in features, R = stored rank, K = rank of the adapter's factors.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor, nn

from qsvd.numerics.codec import PackedBlocks
from qsvd.plan.tensors import AdapterTensors, TensorShape

FEW = 1 << 28  # parameters whose float32 master, gradient and 32-bit Adam state take no more than 4 GB


@dataclass(frozen=True)
class Principal:
    """One weight as it is stored: W ~ residual + up_OR @ down_RI.

    Args:
        residual: Q [O, I].
        up_OR, down_RI: The stored factors, of any float dtype; R is 0 where nothing but the residual is stored.
    """

    residual: PackedBlocks
    up_OR: Tensor
    down_RI: Tensor

    @property
    def rank(self) -> int:
        return self.down_RI.shape[0]


@dataclass(frozen=True)
class AdapterOptions:
    """Which adapter, and what its method may be told.

    Args:
        method: "pissa", "lora", "edora"; None is pissa, or lora where no components are stored.
        rank: Of what is trained; None is the method's own choice.
        alpha: The trained product is multiplied by alpha / rank (LoRA, arXiv:2106.09685); None is the method's choice.
        dtype: Of the trained parameters, "float32" or "bfloat16"; "auto" is float32 up to FEW parameters.
        seed: Of what is drawn.
    """

    method: str | None = None
    rank: int | None = None
    alpha: float | None = None
    dtype: str = "auto"
    seed: int = 0

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32


@dataclass(frozen=True)
class Defaults:
    """What a method does when it is not told, and why.

    rank None is the stored rank, alpha None is the rank, learning_rate is for AdamW.
    """

    rank: int | None
    alpha: float | None
    learning_rate: float
    reason: str


class Adapter(nn.Module, ABC):
    """The trained part of one weight: W' = gain[:, None] * (Q + up @ down).

    A subclass is a method. It brings its options (`defaults`, and what `start` refuses), its hooks in a training step,
    and the forms of export that it does not have.
    """

    defaults: ClassVar[Defaults]
    needs_components: ClassVar[bool] = False  # it trains the stored components: a weight of rank 0 stays frozen
    starts_from_residual: ClassVar[bool] = False  # `start` reads the values of Q
    export_refusals: ClassVar[Mapping[str, str]] = MappingProxyType({})  # form of export -> why it has none

    # Hooks: called once an optimizer step, counted from 1, when the gradients of all its batches are summed.

    @classmethod
    def after_backward(cls, model: nn.Module, step: int) -> None:
        """Act on the gradients before they are clipped."""

    @classmethod
    def transform_grads(cls, model: nn.Module, step: int) -> None:
        """Act on the gradients after they are clipped, right before the optimizer."""

    @classmethod
    def after_step(cls, model: nn.Module, step: int) -> None:
        """Act on the parameters after the optimizer moved them; the gradients are still there."""

    @classmethod
    @abstractmethod
    def start(cls, principal: Principal, options: AdapterOptions, generator: torch.Generator) -> "Adapter":
        """The adapter before the first step, on the device of the principal; the model then computes Q + B A.

        Raises:
            ValueError: the method cannot start from these factors with these options; the sentence says what it needs.
        """

    @classmethod
    @abstractmethod
    def tensors(
        cls, shape: tuple[int, int], stored_rank: int, rank: int, dtype: torch.dtype, stored_dtype: torch.dtype
    ) -> AdapterTensors:
        """What `start` makes of an [O, I] weight, without making it.

        Args:
            stored_rank: R, of the stored factors, in `stored_dtype`.
            rank: K, of what is trained, in `dtype`.
        """

    @classmethod
    def num_parameters(cls, shape: tuple[int, int], rank: int) -> int:
        """Trained parameters of an [O, I] weight at this trained rank."""
        made = cls.tensors(shape, rank, rank, torch.float32, torch.float32)
        return sum(tensor.numel for tensor in made.parameters.values())

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor]:
        """up [O, K] and down [K, I], differentiable, with the scale folded in."""

    def gain(self) -> Tensor | None:
        """A factor for each output, [O], or None where it is 1."""
        return None


def stored_factors(shape: tuple[int, int], rank: int, dtype: torch.dtype) -> dict[str, TensorShape]:
    """The stored factors of an [O, I] weight, kept frozen."""
    return {"frozen_up": TensorShape((shape[0], rank), dtype), "frozen_down": TensorShape((rank, shape[1]), dtype)}


def chosen(options: AdapterOptions, defaults: Defaults, stored_rank: int) -> tuple[int, float]:
    """Rank and scale alpha / rank, as told or by default."""
    rank = options.rank if options.rank is not None else defaults.rank if defaults.rank is not None else stored_rank
    alpha = options.alpha if options.alpha is not None else defaults.alpha if defaults.alpha is not None else rank
    return rank, alpha / rank if rank else 0.0
