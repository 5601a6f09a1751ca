"""A split model before it is made: what is frozen in each block, what is trained, what stays as it was."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from qsvd.memory.items import block_of, page_bytes
from qsvd.plan.allocation import Allocation
from qsvd.plan.tensors import AdapterTensors, TensorShape, total_bytes
from qsvd.plan.weights import ModelPlan, WeightSpec, build

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Block:
    """The split weights of one block.

    Args:
        path: In the model, "model.layers.3".
        codes, scales: Bytes of the residuals; scales has everything but the codes.
        page: Bytes of a page that holds them all.
        parameters: Everything that is trained.
        buffers: Bytes that the adapters keep frozen.
    """

    path: str
    codes: int
    scales: int
    page: int
    parameters: tuple[TensorShape, ...]
    buffers: int

    @property
    def residual(self) -> int:
        return self.codes + self.scales


@dataclass(frozen=True)
class Dense:
    """Bytes of what is not split. The head is 0 where it shares its tensor with the embeddings."""

    embeddings: int
    head: int
    experts: int  # 3-D stacks, which stay in 16 bits
    rest: int

    @property
    def total(self) -> int:
        return self.embeddings + self.head + self.experts + self.rest


@dataclass(frozen=True)
class Skeleton:
    """The 16-bit model on the meta device, everything frozen, to be looked at and run without memory.

    Args:
        dtype: To compute in.
        has_fused_attention: Whether transformers runs it with a kernel that never holds the T x T matrix.
        buffers: Bytes of the buffers that no file holds.
    """

    model: "PreTrainedModel"
    dtype: torch.dtype
    has_fused_attention: bool
    buffers: int


def skeleton(config: "PreTrainedConfig", dtype: torch.dtype) -> Skeleton:
    """Of the model that the config describes; everything is in `dtype` but the buffers, which are counted as made.

    Raises:
        ValueError: no class can be built from the config.
    """
    model = build(config)
    persistent = model.state_dict().keys()
    buffers = sum(buffer.nbytes for name, buffer in model.named_buffers() if name not in persistent)
    is_fused = model.config._attn_implementation != "eager"
    frozen: PreTrainedModel = model.to(dtype=dtype).requires_grad_(False).train()  # pyright: ignore[reportCallIssue]
    return Skeleton(frozen, dtype, is_fused, buffers)


@dataclass(frozen=True, eq=False)  # compared by identity, so that what is counted of one can be kept
class SplitModelPlan:
    """A split model with adapters.

    Args:
        skeleton: Of the 16-bit model.
        names: What is split, and all shapes.
        allocation: Codec and stored rank of each weight.
        adapters: By the weight's tensor name.
    """

    skeleton: Skeleton
    names: ModelPlan
    allocation: Allocation
    adapters: Mapping[str, AdapterTensors]

    @property
    def dtype(self) -> torch.dtype:
        """To compute in; of everything that is neither residual nor adapter."""
        return self.skeleton.dtype

    @property
    def text_config(self) -> "PreTrainedConfig":
        """Of the language model, where there are others beside it."""
        return self.skeleton.model.config.get_text_config()

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """In model order."""
        members: dict[str, list[WeightSpec]] = {}
        for spec in self.names.weights:
            members.setdefault(block_of(spec.module), []).append(spec)
        return tuple(self._block(path, specs) for path, specs in members.items())

    @cached_property
    def dense(self) -> Dense:
        """What is not split, tied tensors once, with the buffers that no file holds."""
        split = {f"{spec.module}.weight" for spec in self.names.weights}
        sizes = {
            name: math.prod(shape) * self.dtype.itemsize
            for name, shape in self.names.shapes.items()
            if name not in split and name not in self.names.tied
        }
        embeddings, head = _names(self.skeleton.model)
        parts = {
            "embeddings": embeddings,
            "head": head - embeddings,
            "experts": {name for name in sizes if _is_expert_stack(name, self.names.shapes[name])},
        }
        found = {part: sum(sizes[name] for name in names & sizes.keys()) for part, names in parts.items()}
        return Dense(**found, rest=sum(sizes.values()) + self.skeleton.buffers - sum(found.values()))

    @property
    def generates(self) -> bool:
        """Whether it makes text, token by token."""
        return self.skeleton.model.can_generate()

    @property
    def is_tied(self) -> bool:
        """Whether embeddings and head are one tensor."""
        return bool(self.names.tied)

    @property
    def elements(self) -> int:
        """Numbers of the weights that are split."""
        return sum(math.prod(spec.shape) for spec in self.names.weights)

    @property
    def parameters(self) -> tuple[TensorShape, ...]:
        """Everything that is trained, in model order."""
        return tuple(tensor for block in self.blocks for tensor in block.parameters)

    @property
    def buffers(self) -> int:
        """Bytes that the adapters keep frozen."""
        return sum(block.buffers for block in self.blocks)

    def _block(self, path: str, specs: Sequence[WeightSpec]) -> Block:
        parts = [self.allocation.choices[spec.module].codec.parts(spec.shape) for spec in specs]
        sizes = [size for sizes in parts for size in sizes.values()]
        codes = sum(sizes["codes"] for sizes in parts)
        adapters = [self.adapters[spec.name] for spec in specs]
        return Block(
            path=path,
            codes=codes,
            scales=sum(sizes) - codes,
            page=page_bytes(sizes),
            parameters=tuple(tensor for adapter in adapters for tensor in adapter.parameters.values()),
            buffers=sum(total_bytes(adapter.buffers.values()) for adapter in adapters),
        )


def _names(model: "PreTrainedModel") -> tuple[set[str], set[str]]:
    """Names of the tensors of the input embeddings, and of the output head."""
    found = []
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        paths = {path for path, other in model.named_modules() if other is module}
        found.append({name for name in model.state_dict() if name.rpartition(".")[0] in paths})
    return found[0], found[1]


def _is_expert_stack(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 and min(shape[-2:]) > 1 and "expert" in name
