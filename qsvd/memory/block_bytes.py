"""Bytes of one block in a training step, counted while it runs forward and backward on the meta device.

The block is transformers' own, so that no architecture is assumed. Twins of SplitLinear replace its linear layers, and
an attention that keeps what the fused kernels keep replaces its attention.
"""

import copy
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from qsvd.errors import BadInput, first_line
from qsvd.memory.experts_twin import ExpertsTwin
from qsvd.memory.split_model import SplitModelPlan
from qsvd.memory.twins import (
    MASKED,
    PLAIN,
    WHOLE,
    Decoding,
    LinearTwin,
    LiveBytes,
    register_attention,
)
from qsvd.plan.weights import BUILD_ERRORS

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Batch:
    """A batch of sequences.

    Args:
        tokens: Length of a sequence.
        batch: Number of sequences.
        is_masked: Whether sequences are padded or packed.
        checkpointing: Whether a block keeps only its input, and runs again in the backward pass.
        device: "cuda" or "cpu", which decides how much is decoded at a time.
    """

    tokens: int
    batch: int
    is_masked: bool
    checkpointing: bool
    device: str


@dataclass(frozen=True)
class BlockPeak:
    """A peak in bytes, and the part of it that is decoded residual."""

    total: int
    decoding: int


@dataclass(frozen=True)
class BlockBytes:
    """Bytes of one block in a training step, without its input.

    Args:
        input: The hidden state that it takes, which is what a checkpoint holds.
        kept: Kept from its forward pass to its backward pass, with its output.
        forward: Peak of the forward pass.
        first: Peak of the backward pass if its parameters have no gradients yet, with the new gradients.
        later: Peak of the backward pass if they have gradients, without these.
        around: Tensors that all blocks share: tokens, position embeddings, masks.
    """

    input: int
    kept: int
    forward: BlockPeak
    first: BlockPeak
    later: BlockPeak
    around: int


@lru_cache(maxsize=4096)
def run_blocks(model: SplitModelPlan, batch: Batch) -> tuple[BlockBytes, ...]:
    """Simulate a training step of every block and return its bytes, in model order. Equal blocks run once.

    Raises:
        BadInput: the model cannot be run from tokens alone.
    """
    register_attention()
    found: dict[Any, BlockBytes] = {}
    runs = []
    for block in model.blocks:
        kind = _kind(model, block.path)
        if kind not in found:
            found[kind] = _run(model, block.path, batch)
        runs.append(found[kind])
    return tuple(runs)


def _kind(model: SplitModelPlan, path: str) -> Any:
    """Return a key that is equal for blocks that need the same bytes."""
    module = model.skeleton.model.get_submodule(path)
    shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
    mine = [spec for spec in model.names.weights if spec.module.startswith(f"{path}.")]
    adapters = tuple((spec.module.removeprefix(path), id(model.adapters[spec.name])) for spec in mine)
    return type(module), shapes, adapters


def _run(model: SplitModelPlan, path: str, batch: Batch) -> BlockBytes:
    live = LiveBytes()
    empty = model.skeleton.model
    mask = _set_attention(model, batch)
    arguments, around = _call_of(empty, path, batch)
    block = _with_twins(model, path, live, batch.device)
    try:
        first = _step(block, arguments, batch, live)
        for parameter in block.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
        later = _step(block, arguments, batch, live)
    except BUILD_ERRORS as error:
        raise BadInput(f"{path} of {type(empty).__name__} cannot be run on its own: {first_line(error)}") from error
    return replace(first, later=later.first, around=around + mask)


def _set_attention(model: SplitModelPlan, batch: Batch) -> int:
    """Give the empty model the attention that the real one will have, and return the bytes of the shared mask."""
    positions = batch.batch * batch.tokens**2
    if not model.skeleton.has_fused_attention:
        kind, mask = WHOLE, positions * model.dtype.itemsize
    elif batch.is_masked:
        kind, mask = MASKED, positions
    else:
        kind, mask = PLAIN, 0
    for module in model.skeleton.model.modules():
        config = getattr(module, "config", None)
        if config is not None:
            config._attn_implementation = kind
    return mask


def _with_twins(model: SplitModelPlan, path: str, live: LiveBytes, device: str) -> nn.Module:
    """Return a copy of the block with twins in place of its quantized layers."""
    block = copy.deepcopy(model.skeleton.model.get_submodule(path))
    stacks: dict[str, list[LinearTwin]] = {}
    for spec in model.names.weights:
        if spec.module.startswith(f"{path}."):
            inside = spec.module.removeprefix(f"{path}.")
            decoding = Decoding(spec.shape, model.allocation.choices[spec.module].codec, device, live)
            if spec.stack:
                stack = stacks.setdefault(spec.stack.removeprefix(f"{path}."), [])
                stack.append(LinearTwin(decoding, model.adapters[spec.name], None))
                continue
            bias = dict(block.get_submodule(inside).named_parameters()).get("bias")
            block.set_submodule(inside, LinearTwin(decoding, model.adapters[spec.name], bias))
    for owner in dict.fromkeys(stack.rpartition(".")[0] for stack in stacks):
        first, last = sorted((stack for stack in stacks if stack.rpartition(".")[0] == owner), reverse=True)
        block.set_submodule(owner, ExpertsTwin(block.get_submodule(owner), stacks[first], stacks[last]))
    return block


class _End(Function):
    """Stands for all that follows a block: keeps nothing of its output, and returns a gradient for it."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, gradient: Tensor | None) -> Tensor:
        ctx.gradient, ctx.like = gradient, (output.shape, output.dtype)
        return output.new_empty(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        shape, dtype = ctx.like
        gradient, ctx.gradient = ctx.gradient, None
        return gradients[0].new_empty(shape, dtype=dtype) if gradient is None else gradient, None


def _step(block: nn.Module, arguments: tuple[Any, Any], batch: Batch, live: LiveBytes) -> BlockBytes:
    """Run the block forward and backward. The caller fills `later` and `around`."""
    positional, named = arguments
    positional[0].grad = None
    before = live.now
    live.restart()
    with live, torch.set_grad_enabled(not batch.checkpointing):
        output = _first_tensor(block(*positional, **named))
    forward, kept = _peak(live, before), live.now - before
    gradient = None
    if batch.checkpointing:
        del output
        live.restart()
        with live:
            gradient = positional[0].new_empty(positional[0].shape)
            output = _first_tensor(block(*positional, **named))
    else:
        live.restart()
    with live:
        end = _End.apply(output, gradient)
        del output, gradient
        assert isinstance(end, Tensor), "apply returns what forward does"
        end.backward()
    return BlockBytes(positional[0].nbytes, kept, forward, _peak(live, before), BlockPeak(0, 0), 0)


def _first_tensor(output: Any) -> Tensor:
    """Return the hidden state of a block that returns it alone or in a tuple."""
    return output if isinstance(output, Tensor) else output[0]


def _peak(live: LiveBytes, before: int) -> BlockPeak:
    return BlockPeak(live.peak - before, live.marked_at_peak)


class _Reached(Exception):
    """Carries the arguments of a block out of the model that called it."""

    def __init__(self, arguments: tuple[Any, Any]):
        super().__init__()
        self.arguments = arguments


def _call_of(empty: "PreTrainedModel", path: str, batch: Batch) -> tuple[tuple[Any, Any], int]:
    """Return the arguments with which the model calls a block, and the bytes made before it, without its input."""

    def stop(_module: nn.Module, arguments: Any, options: Any) -> None:
        raise _Reached((arguments, options))

    hook = empty.get_submodule(path).register_forward_pre_hook(stop, with_kwargs=True)
    ids = torch.empty(batch.batch, batch.tokens, dtype=torch.long, device="meta")
    live = LiveBytes([*empty.parameters(), *empty.buffers(), ids])
    try:
        with live:
            empty.base_model(input_ids=ids, use_cache=False)
    except _Reached as reached:
        (hidden, *others), options = reached.arguments
        leaf = torch.empty_like(hidden, device="meta").requires_grad_()
        return ((leaf, *others), options), live.now - hidden.nbytes
    except BUILD_ERRORS as error:
        raise BadInput(f"{type(empty).__name__} cannot be run from tokens alone: {first_line(error)}") from error
    finally:
        hook.remove()
    raise BadInput(f"{type(empty).__name__} does not call {path} for tokens; only language models can be planned")
