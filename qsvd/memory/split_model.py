"""A quantized model with adapters, known by its shapes: what is frozen, trained and not quantized in each block."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import nn

from qsvd.memory.items import block_of, page_bytes
from qsvd.plan.allocation import Allocation, Choice, Table
from qsvd.plan.language import modalities
from qsvd.plan.tensors import AdapterTensors, TensorShape, total_bytes
from qsvd.plan.weights import ModelPlan, WeightSpec, build

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Block:
    """The quantized weights of one block.

    Args:
        path: Its path in the model, "model.layers.3".
        codes, scales: Bytes of the residuals; scales counts everything but the codes.
        page: Bytes of a page that holds them all.
        parameters: The trained tensors; those that weights have in common are of the last block that has them.
        buffers: Bytes of the frozen tensors of the adapters.
        is_tower: Whether it belongs to an encoder of images or sound, which tokens alone do not run.
    """

    path: str
    codes: int
    scales: int
    page: int
    parameters: tuple[TensorShape, ...]
    buffers: int
    is_tower: bool

    @property
    def residual(self) -> int:
        return self.codes + self.scales


@dataclass(frozen=True)
class Dense:
    """Bytes of the tensors that are not quantized. The head is 0 if it shares its tensor with the embeddings."""

    embeddings: int
    head: int
    experts: int  # stacks that are not quantized
    rest: int

    @property
    def total(self) -> int:
        return self.embeddings + self.head + self.experts + self.rest


@dataclass(frozen=True)
class Skeleton:
    """The 16-bit model on the meta device, which runs without memory; everything is frozen.

    Args:
        dtype: Compute dtype.
        has_fused_attention: Whether transformers runs it with a kernel that never holds the T x T matrix.
        buffers: Bytes of the buffers that are in no file.
    """

    model: "PreTrainedModel"
    dtype: torch.dtype
    has_fused_attention: bool
    buffers: int


def skeleton(config: "PreTrainedConfig", dtype: torch.dtype) -> Skeleton:
    """Return the model that a config describes, in `dtype`; its buffers are counted in the dtypes they are made in.

    Raises:
        BadInput: no class can be built from the config.
    """
    model = build(config)
    persistent = model.state_dict().keys()
    buffers = sum(buffer.nbytes for name, buffer in model.named_buffers() if name not in persistent)
    is_fused = model.config._attn_implementation != "eager"
    for module in model.modules():
        if hasattr(module, "warn_if_padding_and_no_attention_mask"):
            module.warn_if_padding_and_no_attention_mask = _say_nothing  # it would look at the tokens  # pyright: ignore
    frozen: PreTrainedModel = model.to(dtype=dtype).requires_grad_(False).train()  # pyright: ignore[reportCallIssue]
    return Skeleton(frozen, dtype, is_fused, buffers)


def _say_nothing(*_: object) -> None:
    """Return at once."""


@dataclass(frozen=True, eq=False)  # compared by identity, as a key of caches
class SplitModelPlan:
    """A quantized model with adapters.

    Args:
        skeleton: The 16-bit model.
        names: Its weights to quantize, and all shapes.
        allocation: Codec and stored rank of each weight.
        adapters: The tensors of each adapter, by the weight's tensor name.
        method: Of the adapters.
        tables: The embedding and the head, if they are quantized.
    """

    skeleton: Skeleton
    names: ModelPlan
    allocation: Allocation
    adapters: Mapping[str, AdapterTensors]
    method: str
    tables: tuple[Table, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of everything but residuals and adapters, and of the computation."""
        return self.skeleton.dtype

    @cached_property
    def adapter_dtype(self) -> torch.dtype:
        """Dtype of the trained parameters."""
        return next(tensor.dtype for made in self.adapters.values() for tensor in made.trained.values())

    @property
    def text_config(self) -> "PreTrainedConfig":
        """Config of the language model."""
        return self.skeleton.model.config.get_text_config()

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks in model order."""
        members: dict[str, list[WeightSpec]] = {}
        for spec in self.names.weights:
            members.setdefault(block_of(spec.module), []).append(spec)
        last = {}  # where the backward pass makes the gradients of what weights have in common
        for path, specs in members.items():
            adapters = (self.adapters[spec.name] for spec in specs)
            last |= {adapter.family: (path, adapter.common) for adapter in adapters if adapter.common}
        common: dict[str, list[TensorShape]] = {}
        for path, tensors in last.values():
            common.setdefault(path, []).extend(tensors.values())
        return tuple(self._block(path, specs, common.get(path, ())) for path, specs in members.items())

    @property
    def language_blocks(self) -> tuple[Block, ...]:
        """The blocks that tokens run through."""
        return tuple(block for block in self.blocks if not block.is_tower)

    @cached_property
    def dense(self) -> Dense:
        """Bytes of what is not quantized, tied tensors once, with the buffers that are in no file."""
        split = {spec.place for spec in self.names.weights}
        sizes = {
            name: math.prod(shape) * self.dtype.itemsize
            for name, shape in self.names.shapes.items()
            if name not in split and name not in self.names.tied
        }
        sizes |= {table.place: table.codec.num_bytes(table.shape) for table in self.tables if table.place in sizes}
        embeddings, head = _names(self.skeleton.model)
        parts = {
            "embeddings": embeddings,
            "head": head - embeddings,
            "experts": {name for name in sizes if _is_expert_stack(name, self.names.shapes[name])},
        }
        found = {part: sum(sizes[name] for name in names & sizes.keys()) for part, names in parts.items()}
        return Dense(**found, rest=sum(sizes.values()) + self.skeleton.buffers - sum(found.values()))

    @property
    def all_choices(self) -> dict[WeightSpec, Choice]:
        """Codec and stored rank of all that is quantized: weights, embedding and head."""
        chosen = {spec: self.allocation.choices[spec.module] for spec in self.names.weights}
        return chosen | {table: Choice(table.codec, 0) for table in self.tables}

    @cached_property
    def decoded_head(self) -> int:
        """Bytes of a quantized output head, decoded; 0 if it is in 16 bits."""
        head = _names(self.skeleton.model)[1]
        shapes = (table.shape for table in self.tables if head & {table.place, *table.others})
        return sum(math.prod(shape) * self.dtype.itemsize for shape in shapes)

    @cached_property
    def recomputes_blocks(self) -> bool:
        """Whether transformers can recompute the first blocks alone, which also compute before the last ones.

        Blocks of several encoders, as of images, may compute in another order than the model lists them.
        """
        from transformers.modeling_layers import GradientCheckpointingLayer

        model = self.skeleton.model
        modules = [model.get_submodule(block.path) for block in self.blocks]
        stacks = {block.path.rpartition(".")[0] for block in self.blocks}
        is_in_order = len(stacks) == 1 or bool(model.config.is_encoder_decoder)
        return is_in_order and all(isinstance(module, GradientCheckpointingLayer) for module in modules)

    @property
    def generates(self) -> bool:
        """Whether the model can generate text."""
        return self.skeleton.model.can_generate()

    @property
    def is_tied(self) -> bool:
        """Whether embeddings and head are one tensor."""
        return bool(self.names.tied)

    @property
    def elements(self) -> int:
        """How many numbers the quantized weights of the blocks have."""
        return sum(math.prod(spec.shape) for spec in self.names.weights)

    @property
    def parameters(self) -> tuple[TensorShape, ...]:
        """The trained tensors in model order."""
        return tuple(tensor for block in self.blocks for tensor in block.parameters)

    @property
    def buffers(self) -> int:
        """Bytes of the frozen tensors of the adapters, those that weights have in common once."""
        shared = {(one.family, *item) for one in self.adapters.values() for item in one.shared.items()}
        return sum(block.buffers for block in self.blocks) + total_bytes(tensor for _, _, tensor in shared)

    @property
    def hook_state(self) -> int:
        """Bytes that the hooks of the method keep between steps."""
        return sum(total_bytes(adapter.state.values()) for adapter in self.adapters.values())

    def _block(self, path: str, specs: Sequence[WeightSpec], common: Sequence[TensorShape]) -> Block:
        parts = [self.allocation.choices[spec.module].codec.parts(spec.shape) for spec in specs]
        sizes = [size for sizes in parts for size in sizes.values()]
        codes = sum(sizes["codes"] for sizes in parts)
        adapters = [self.adapters[spec.name] for spec in specs]
        return Block(
            path=path,
            codes=codes,
            scales=sum(sizes) - codes,
            page=page_bytes(sizes),
            parameters=(*(tensor for adapter in adapters for tensor in adapter.parameters.values()), *common),
            buffers=sum(total_bytes(adapter.buffers.values()) for adapter in adapters),
            is_tower=specs[0].is_tower,
        )


def _names(model: "PreTrainedModel") -> tuple[set[str], set[str]]:
    """Return the tensor names of the input embeddings and of the output head."""
    found = []
    if "text" not in modalities(model):
        return set(), set()
    embedding = next(iter(_embeddings(model)), None)
    for module in (embedding, model.get_output_embeddings()):
        paths = {path for path, other in model.named_modules() if other is module and module is not None}
        found.append({name for name in model.state_dict() if name.rpartition(".")[0] in paths})
    return found[0], found[1]


def _embeddings(model: "PreTrainedModel") -> Iterator[nn.Module]:
    """Yield the token embeddings of a model; some models of images and text do not name theirs."""
    try:
        yield model.get_input_embeddings()
    except NotImplementedError:
        yield from (module for module in model.modules() if isinstance(module, nn.Embedding))


def _is_expert_stack(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 and min(shape[-2:]) > 1 and "expert" in name
