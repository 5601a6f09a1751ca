"""Bytes of one block in a training step, counted while it runs forward and backward on the meta device.

The block is transformers' own, so that no architecture is assumed. Twins of SplitLinear replace its linear layers, and
an attention that keeps what the fused kernels keep replaces its attention.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import Function

from qsvd.errors import BadInput, first_line
from qsvd.memory.interfaces import CPU, MASKED, NO_EXPERTS, PLAIN, WHOLE, ExpertsTwin, register_attention, unpacked
from qsvd.memory.split_model import Skeleton, SplitModelPlan
from qsvd.memory.twins import Decoding, LinearTwin, LiveBytes
from qsvd.plan.language import example_inputs, language_model
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


# A backward pass that is counted: the parameters have no gradients yet, or have them. "none" is a forward pass alone.
Backward = Literal["first", "later", "none"]


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
        backward: Peak of the backward pass: with the new gradients, or without those that the parameters have.
        around: Tensors that all blocks share: tokens, position embeddings, masks.
    """

    input: int
    kept: int
    forward: BlockPeak
    backward: BlockPeak
    around: int


@lru_cache(maxsize=4096)
def run_blocks(model: SplitModelPlan, batch: Batch, backward: Backward) -> tuple[BlockBytes, ...]:
    """Simulate a step of every language block and return its bytes, in model order. Equal blocks run once.

    Raises:
        BadInput: the model cannot be run from tokens alone.
    """
    register_attention()
    found: dict[Any, BlockBytes] = {}
    runs = []
    for block in model.language_blocks:
        kind = _kind(model, block.path)
        if kind not in found:
            found[kind] = _run(model, block.path, batch, backward)
        runs.append(found[kind])
    return tuple(runs)


def _kind(model: SplitModelPlan, path: str) -> Any:
    """Return a key that is equal for blocks that need the same bytes."""
    try:
        module = model.skeleton.model.get_submodule(path)
    except AttributeError as error:
        raise BadInput(f"config.json makes no block {path}, which the quantized model has; copy it again") from error
    shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
    mine = [spec for spec in model.names.weights if spec.module.startswith(f"{path}.")]
    adapters = tuple((spec.module.removeprefix(path), id(model.adapters[spec.name])) for spec in mine)
    return type(module), shapes, adapters


STRETCH = 64  # tokens; a block that loops over tokens is run with 1, 2 and 3 times as many
MORE = 4  # operations, as for a length that is padded, which are no loop


def _run(model: SplitModelPlan, path: str, batch: Batch, backward: Backward) -> BlockBytes:
    """Run a block; one that loops over tokens, as Mamba does without kernels, with few tokens only."""
    if batch.tokens <= 3 * STRETCH or not _loops(_Structure(model.skeleton, path, model)):
        return _run_counted(model, path, batch, backward)[0]
    short = [replace(batch, tokens=times * STRETCH) for times in (1, 2, 3)]
    return _stretched([_run_counted(model, path, one, backward)[0] for one in short], batch.tokens / STRETCH)


@dataclass(frozen=True)
class _Structure:
    """A block of a model, whatever its ranks and adapters are."""

    skeleton: Skeleton
    path: str
    model: SplitModelPlan = field(compare=False)


@lru_cache(maxsize=4096)
def _loops(block: _Structure) -> bool:
    """Tell whether a block does more operations for more tokens, each time: a mask, from some length on, is no loop."""
    batches = (Batch(times * STRETCH, 1, is_masked=False, checkpointing=True, device="cpu") for times in (1, 2, 3))
    calls = (_run_counted(block.model, block.path, batch, "none")[1] for batch in batches)  # the third after a rise
    return all(many > few + MORE for few, many in pairwise(calls))


def _stretched(runs: Sequence[Any], times: float) -> Any:
    """Return what the runs with 1, 2 and 3 parts of tokens would be with `times` parts: a square of the tokens."""
    first, second, third = runs
    if isinstance(first, int):
        bend = (third - 2 * second + first) / 2
        return round(first + (second - first - 3 * bend) * (times - 1) + bend * (times**2 - 1))
    parts = {f.name: _stretched([getattr(run, f.name) for run in runs], times) for f in fields(first)}
    return type(first)(**parts)


@lru_cache(maxsize=4096)  # the short runs of a loop serve every length
def _run_counted(model: SplitModelPlan, path: str, batch: Batch, backward: Backward) -> tuple[BlockBytes, int]:
    """Run a block with our attention, or with the model's own, eager one if that is not called through transformers.

    Returns:
        Its bytes, and the number of operations.
    """
    try:
        return _run_with(model, path, batch, backward, _attention(model, batch))
    except BadInput as error:
        try:
            return _run_with(model, path, batch, backward, "eager")
        except BadInput:
            raise error from None


def _run_with(
    model: SplitModelPlan, path: str, batch: Batch, backward: Backward, attention: str
) -> tuple[BlockBytes, int]:
    live = LiveBytes()
    empty = model.skeleton.model
    _set_kernels(empty, _attn_implementation=attention, _experts_implementation=NO_EXPERTS)
    arguments, around = _call_of(empty, path, batch)
    block = _with_twins(model, path, live, batch.device)
    if model.dtype == torch.bfloat16:  # in which transformers runs experts that are not quantized, on the meta device
        _set_kernels(block, _experts_implementation="grouped_mm")
    if backward == "later":
        for parameter in block.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
    try:
        found = _step(block, arguments, batch, live, backward)
    except BUILD_ERRORS as error:
        raise BadInput(f"{path} of {type(empty).__name__} cannot be run on its own: {first_line(error)}") from error
    return replace(found, around=around), live.calls


def _set_kernels(part: nn.Module, **names: str) -> None:
    """Choose attention and experts of a part of a model by their names in transformers."""
    for module in part.modules():
        config = getattr(module, "config", None)
        for option, name in names.items() if config is not None else ():
            setattr(config, option, name)


def _attention(model: SplitModelPlan, batch: Batch) -> str:
    """Return the attention that the real model will have."""
    if not model.skeleton.has_fused_attention:
        return WHOLE
    name = MASKED if batch.is_masked else PLAIN
    return name + CPU if batch.device == "cpu" else name


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
            block.set_submodule(inside, LinearTwin(decoding, model.adapters[spec.name], bias, model.dtype))
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


def _step(
    block: nn.Module, arguments: tuple[Any, Any], batch: Batch, live: LiveBytes, backward: Backward
) -> BlockBytes:
    """Run the block forward and backward. The caller fills `around`."""
    positional, named = arguments
    before = live.now
    live.restart()
    with live, torch.set_grad_enabled(not batch.checkpointing):
        output = _first_tensor(block(*positional, **named))
    forward, kept = _peak(live, before), live.now - before
    if backward == "none":
        return BlockBytes(positional[0].nbytes, kept, forward, BlockPeak(0, 0), 0)
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
    return BlockBytes(positional[0].nbytes, kept, forward, _peak(live, before), 0)


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
    inputs = example_inputs(empty, batch.batch, batch.tokens, "meta")
    inputs = {name: x.to(empty.dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    live = LiveBytes([*empty.parameters(), *empty.buffers(), *inputs.values()])
    options = {"use_cache": False} if empty.can_generate() else {}
    try:
        with live, unpacked():
            language_model(empty)(**inputs, **options)
    except _Reached as reached:
        (hidden, *others), options = reached.arguments
        leaf = torch.empty_like(hidden, device="meta").requires_grad_()
        return ((leaf, *others), options), live.now - hidden.nbytes
    except BUILD_ERRORS as error:
        raise BadInput(f"{type(empty).__name__} cannot be run on its own: {first_line(error)}") from error
    finally:
        hook.remove()
    raise BadInput(f"{type(empty).__name__} does not call {path} for {' and '.join(inputs)}, and cannot be planned")
