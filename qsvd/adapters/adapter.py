"""The interface of every method: an adapter is trained, the residual of its weight is frozen.

Trained tensors are nn.Parameters. Frozen ones are buffers, which are read from the quantized model and not saved; those
that are not in it are persistent buffers, and saved with what is trained.

Shape suffixes: O = out features, I = in features, R = stored rank, K = rank of the adapter's factors.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qsvd.adapters.methods.hooks import Hooks
from qsvd.errors import BadInput
from qsvd.numerics.codec import PackedBlocks
from qsvd.plan.tensors import AdapterTensors, Family, Layers, TensorShape

NO_LORA_OF_GAINS = MappingProxyType(
    {
        "lora": "{method} scales the rows of each weight, which a LoRA on the 16-bit model cannot do; "
        "export a PEFT adapter for the quantized model (--to peft), or merged weights (--to merged)"
    }
)
TINY = torch.finfo(torch.float32).tiny  # least square of a norm, so that a row of zeros keeps the gain 1
FEW = 1 << 28  # parameters whose float32 master, gradient and 32-bit Adam state take no more than 4 GB


@dataclass(frozen=True)
class StoredWeight:
    """One weight of a quantized model: W ~ residual + up_OR @ down_RI.

    Args:
        residual: Q [O, I].
        up_OR, down_RI: The components, of any float dtype; R is 0 if only the residual is stored.
        name: Of its tensor in the files of the quantized model.
        gradient: Left [O, 2 K] and right [K, I] singular vectors of the gradient of the loss, for a method that starts
            from them; None for a run, whose tensors follow.
        module: Path of its layer.
        family: That it belongs to; None is one of its own.
        common: The tensors that the family has in common.
    """

    residual: PackedBlocks
    up_OR: Tensor
    down_RI: Tensor
    name: str = ""
    gradient: tuple[Tensor, Tensor] | None = None
    module: str = ""
    family: Family | None = None
    common: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return self.down_RI.shape[0]


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """The options of a method that has none of its own."""


@dataclass(frozen=True)
class AdapterOptions:
    """The method of an adapter and its options.

    Args:
        method: A name that `qsvd methods` lists; None is pissa, or lora if a weight has no components.
        rank: Trained rank; None is the default of the method.
        alpha: The trained product is multiplied by alpha / rank (LoRA, arXiv:2106.09685). None is the alpha that gives
            the method's default scale.
        dtype: Dtype of the trained parameters, "float32" or "bfloat16"; "auto" is float32 up to FEW parameters.
        seed: Seed of random initial values.
        target_modules: The layers to train: names ("q_proj"), globs on paths, or "all-linear"; empty is all. The
            components of the others are frozen.
        dropout: Of the input of LoRA's trained factors, from 0 to below 1.
        rslora: The scale is alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732).
        own: Options of the method's own, by name, such as {"target_rank": 8} of adalora; the others have their
            defaults.
    """

    method: str | None = None
    rank: int | None = None
    alpha: float | None = None
    dtype: str = "auto"
    seed: int = 0
    target_modules: tuple[str, ...] = ()
    dropout: float = 0.0
    rslora: bool = False
    own: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32


@dataclass(frozen=True)
class Defaults:
    """The options of a method that are not given, and why they are so.

    Args:
        rank: None is the stored rank.
        scale: Of the trained product: the same at every rank, and with rslora at the default rank.
        learning_rate: For AdamW.
    """

    rank: int | None
    scale: float
    learning_rate: float
    reason: str

    def rank_and_scale(self, options: AdapterOptions, stored_rank: int) -> tuple[int, float]:
        """Return the rank and the scale, alpha / rank or alpha / sqrt(rank), as given or by default."""
        rank = self.rank_of(options, stored_rank)
        if not rank:
            return rank, 0.0
        return rank, self.alpha_of(options, rank) / (math.sqrt(rank) if options.rslora else rank)

    def rank_of(self, options: AdapterOptions, stored_rank: int) -> int:
        """Return the trained rank."""
        return next(rank for rank in (options.rank, self.rank, stored_rank) if rank is not None)

    def alpha_of(self, options: AdapterOptions, rank: int) -> float:
        """Return alpha at this trained rank."""
        if options.alpha is not None:
            return options.alpha
        return self.scale * (math.sqrt(self.rank or rank) if options.rslora else rank)


class Adapter(nn.Module, ABC):
    """The trained part of one weight: y = x W'^T + delta(x), with W' = gain[:, None] * (Q + up @ down).

    A subclass is a method. It brings its options (`options`, `defaults`, `shared_options`, and what `start` refuses),
    its hooks in a training step, the forms of export that it does not have, and what `qsvd methods` prints.

    Attributes:
        dropout: Of the input of the trained factors, while training. Above 0 it needs `divided`.
        frozen_rank: Leading columns of up and rows of down that are frozen: their gradients are given as 0.
        family: The name of its family; empty for a weight that has no tensors in common with others.
        looks: Whether `look` is called while training.
    """

    dropout: float = 0.0
    frozen_rank: int = 0
    family: str = ""
    looks: bool = False

    paper: ClassVar[str]  # its arXiv number, "2404.02948"
    starts_as: ClassVar[str]  # what the trained part is before the first step, in a few words
    defaults: ClassVar[Defaults]
    options: ClassVar[type] = NoOptions  # a dataclass; each field is an option of `qsvd train --method NAME`
    shared_options: ClassVar[tuple[str, ...]] = ()  # of AdapterOptions, that other methods refuse
    hooks: ClassVar[type[Hooks]] = Hooks
    needs_components: ClassVar[bool] = False  # it trains the stored components: a weight of rank 0 stays frozen
    starts_from_residual: ClassVar[bool] = False  # `start` reads the values of Q
    starts_from_gradient: ClassVar[bool] = False  # `start` takes a gradient, from the file of its option `gradients`
    takes_rank: ClassVar[bool] = True  # else it trains all stored components, unscaled; see `check_as_stored`
    has_gain: ClassVar[bool] = False  # `gain` returns numbers
    in_common: ClassVar[tuple[str, ...]] = ()  # its tensors that the weights of a family have in common, by name
    is_routed: ClassVar[bool] = False  # `delta` is not linear in x: no weight computes what the layer does
    component_use: ClassVar[str] = "trains stored components"  # what needs them, in a refusal where there are none
    export_refusals: ClassVar[Mapping[str, str]] = MappingProxyType({})  # form of export -> why it has none

    @classmethod
    @abstractmethod
    def start(cls, stored: StoredWeight, options: AdapterOptions, generator: torch.Generator) -> "Adapter":
        """Return the adapter before the first step, on the device of `stored`; the layer then computes Q + B A.

        Raises:
            BadInput: the method cannot start from these components with these options.
        """

    @classmethod
    @abstractmethod
    def tensors(
        cls, shape: tuple[int, int], stored_rank: int, rank: int, dtype: torch.dtype, stored_dtype: torch.dtype
    ) -> AdapterTensors:
        """Return the shapes of what `start` makes for an [O, I] weight.

        Args:
            stored_rank: R, the rank of the components, which are in `stored_dtype`.
            rank: K, the trained rank, in `dtype`.
        """

    @classmethod
    def families(cls, layers: Layers, options: AdapterOptions) -> Mapping[str, Family]:
        """Return the family of each layer of `layers.targets`, by its path; one that is left out stays frozen.

        Only for a method with `in_common`.

        Raises:
            BadInput: no layer of the model has a family.
        """
        raise NotImplementedError(f"{cls.__name__} has no families")

    @classmethod
    def common(
        cls,
        family: Any,
        options: AdapterOptions,
        components: Callable[[str], tuple[Tensor, Tensor]] | None,
        like: Tensor,
    ) -> Mapping[str, Tensor]:
        """Return the tensors that the weights of a family have in common, by the names in `in_common`.

        Args:
            components: Reads B0 and A0 of a layer by its path; None if the tensors of a run follow.
            like: A tensor on the device, in the dtype of the components.
        """
        raise NotImplementedError(f"{cls.__name__} has no families")

    @classmethod
    def planned(cls, options: AdapterOptions, family: Any, *sizes: Any) -> AdapterTensors:
        """Return `tensors` of a weight with these options, as a member of a family; None is one of its own.

        Args:
            sizes: The arguments of `tensors`.
        """
        del family
        shape, stored_rank, rank, *dtypes = sizes
        return cls.tensors_for(cls.own(options), shape, stored_rank, rank, (dtypes[0], dtypes[1]))

    @classmethod
    def tensors_for(
        cls, own: Any, shape: tuple[int, int], stored_rank: int, rank: int, dtypes: tuple[torch.dtype, torch.dtype]
    ) -> AdapterTensors:
        """Return `tensors` with these options of the method's own, which shapes of some methods depend on.

        Args:
            own: An instance of `options`; `tensors` alone takes their defaults.
            dtypes: Of what is trained, and of the components.
        """
        del own
        return cls.tensors(shape, stored_rank, rank, *dtypes)

    @classmethod
    def check_shapes(cls, shapes: Mapping[str, tuple[int, int]], options: AdapterOptions) -> None:
        """Refuse options that do not fit the shapes [O, I] of the layers to train, by BadInput with all of these."""

    @classmethod
    def kept(cls, own: Any, shape: tuple[int, int]) -> Mapping[str, TensorShape]:
        """Return what the hooks keep between steps for an [O, I] weight with these options of the method's own alone.

        It is counted besides the `state` of `tensors`.
        """
        del own, shape
        return {}

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor]:
        """Return up [O, K] and down [K, I], differentiable, with the scale folded in."""

    def divided(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return the frozen and the trained part of the factors, each as `factors` does, for dropout."""
        raise NotImplementedError(f"{type(self).__name__} has no dropout")

    def gain(self, read: Callable[[], PackedBlocks]) -> Tensor | None:
        """Return a factor for each output, [O], or None if all are 1.

        Args:
            read: Returns Q. It may copy a page to the device: called only if the values of Q are needed.
        """
        del read
        return None

    def delta(self, x_TI: Tensor) -> Tensor | None:
        """Return what is added to the output, [T, O] in the dtype of x; None if nothing is.

        It is for a trained part that is no product of two thin factors. Such a method is exported as merged weights
        alone, which needs a linear part; one that is not linear (`is_routed`) has no export.
        """
        del x_TI
        return None

    def pair(self) -> tuple[nn.Parameter, nn.Parameter] | None:
        """Return the two trained factors, up [O, K] and down [K, I], for preconditioners; None if there is no pair."""
        return None

    def rates(self) -> Mapping[str, float]:
        """Return by which factor the learning rate of each parameter differs from that of the run; 1 is left out."""
        return {}

    def look(self, x_TI: Tensor) -> None:
        """Look at the inputs of the layer, once for each token of a training step; called if `looks` is True."""

    def forget(self) -> None:
        """Forget what was computed from the parameters: they have changed."""

    def exported(self) -> tuple[Tensor, Tensor]:
        """Return the factors without the rows that are zero for good."""
        return self.factors()

    @classmethod
    def own(cls, options: AdapterOptions) -> Any:
        """Return the options of the method's own, as an instance of `options`."""
        return cls.options(**options.own)


def no_components(method: str, use: str = Adapter.component_use) -> BadInput:
    """Return the refusal of a method that needs stored components; `use` is its `component_use`."""
    return BadInput(
        f"{method} {use}, and the quantized model has none (rank 0); quantize with --rank above 0, or use --method lora"
    )


def check_as_stored(method: str, stored: StoredWeight, options: AdapterOptions) -> None:
    """Refuse a rank and an alpha for a method that trains the components as they are stored, and their absence."""
    if stored.rank == 0:
        raise no_components(method)
    if options.rank not in (None, stored.rank):
        raise BadInput(
            f"rank {options.rank} is not the stored rank {stored.rank}, the only one that {method} can train; "
            "leave out --rank, quantize with another --rank, or give --method lora"
        )
    check_alpha(method, stored.rank, options.alpha)


def check_alpha(method: str, rank: int, alpha: float | None) -> None:
    """Refuse an alpha that is not the rank of the components that a method trains as they are stored."""
    if alpha not in (None, rank):
        raise BadInput(
            f"alpha {alpha:g} would scale the stored components; with {method} it is the rank {rank}: leave it out"
        )


def frozen_shapes(shape: tuple[int, int], rank: int, dtype: torch.dtype) -> dict[str, TensorShape]:
    """Return the shapes of the frozen components of an [O, I] weight."""
    return {"frozen_up": TensorShape((shape[0], rank), dtype), "frozen_down": TensorShape((rank, shape[1]), dtype)}
