"""A 16-bit model of which only one block at a time is in memory, with the layers around the blocks.

It is built on the meta device. Embeddings, head and norms are read from the checkpoint once; the tensors of a block are
read each time the block is needed, and freed with the dictionary that holds them.
"""

import copy
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qsvd.adapters.experts import open_stack
from qsvd.calibrate.stand_in import NOT_ALONE, AllCalled, Call, StandIn, Tape
from qsvd.errors import BadInput, first_line, listing
from qsvd.files.source import Checkpoint
from qsvd.memory.items import block_of
from qsvd.plan.weights import BUILD_ERRORS, ModelPlan, WeightSpec


class StreamedModel:
    """A model whose blocks are read when they are needed.

    Args:
        checkpoint: A 16-bit model.
        plan: Its plan, with the names of the checkpoint; statistics are made of its weights.
        dtype: Dtype of weights and activations.
        twice: Whether gradients are differentiated again, which fused attention does not support.

    Raises:
        BadInput: a parameter of the model is not in the checkpoint, or it has no blocks.
    """

    def __init__(
        self, checkpoint: Checkpoint, plan: ModelPlan, device: torch.device, dtype: torch.dtype, *, twice: bool
    ):
        self.checkpoint, self.plan, self.device, self.dtype = checkpoint, plan, device, dtype
        self._stacks: dict[str, list[WeightSpec]] = {}
        for spec in plan.weights:
            if spec.stack:
                self._stacks.setdefault(spec.stack, []).append(spec)
        self._model = _build(checkpoint, plan, device, twice=twice)
        for path, experts in self._stacks.items():
            _open_experts(self._model, path, experts)
        self._empty = {path: self._model.get_submodule(path) for path in _block_paths(self._model, plan)}
        self.num_blocks = len(self._empty)
        self._tapes: list[Tape] = []
        self._names = {path: [n for n in plan.shapes if n.startswith(f"{path}.")] for path in self._empty}
        _check_readable(self._model, plan, self._stacks)
        inside = {name for names in self._names.values() for name in names}
        self._around = self._read([name for name in plan.shapes if name not in inside])
        for path, block in self._empty.items():
            self._model.set_submodule(path, StandIn(path, block, self._tapes))
        self._returns: int | None = None  # known after one block has been run

    def weights(self, path: str) -> tuple[WeightSpec, ...]:
        """Return the weights of one block that need statistics."""
        return tuple(spec for spec in self.plan.weights if spec.module.startswith(f"{path}."))

    def wanted(self, path: str) -> tuple[str, ...]:
        """Return their names inside the block."""
        return tuple(f"{spec.module.removeprefix(f'{path}.')}.weight" for spec in self.weights(path))

    def block(self, path: str) -> nn.Module:
        """Return the module of a block, without its tensors."""
        return self._empty[path]

    def read_block(self, path: str) -> dict[str, Tensor]:
        """Read all tensors of one block to the device; return them by their names inside the block."""
        return {name.removeprefix(f"{path}."): tensor for name, tensor in self._read(self._names[path]).items()}

    def record(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, list[Call]]:
        """Run the model up to its last block, with stand-ins for the blocks.

        Args:
            inputs: Arguments of the model's forward, with a batch of one, on the device.

        Returns:
            The hidden states before the first block [1, T, D], in CPU memory, and the call of each block.

        Raises:
            BadInput: the model does not call every block once, each with the output of the one before.
        """
        if self._returns is None:
            self._returns = self._returned_by_a_block(inputs)
        tape = Tape(self.num_blocks, None, self._returns, keep=True)
        self._run(inputs, tape)
        called = [call.path for call in tape.calls]
        never = [path for path in self._empty if path not in called]
        if never or tape.hidden is None:
            raise BadInput(
                f"{self.plan.architecture} does not call {listing(never)} for a text; --exclude them, or give the part "
                "of the model that reads texts"
            )
        return tape.hidden.cpu(), tape.calls

    def run_block(self, call: Call, weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        """Return the hidden states after a block, differentiable in its weights and its input."""
        returned = call.run(self._empty[call.path], weights, hidden)
        return returned if isinstance(returned, Tensor) else returned[0]

    def logits(self, inputs: Mapping[str, Tensor], hidden: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the logits for an output of the last block, and tensors in place of the other blocks' outputs.

        If a gradient reaches one of those tensors, the model uses the output of a block outside the next block.

        Args:
            inputs: As for `record`.
            hidden: Output of the last block on the device; the logits are differentiable in it.
        """
        assert self._returns is not None, "record() was called before"
        tape = Tape(self.num_blocks, hidden, self._returns, keep=False)
        return self._run(inputs, tape).logits, tape.passed[:-1]

    def check_called_once(self, inputs: Mapping[str, Tensor], hidden: Tensor) -> None:
        """Raise BadInput if the model calls a block again after the last one, as models with shared layers do.

        Args:
            inputs: As for `record`.
            hidden: In the shape of the output of the last block, on the device.
        """
        assert self._returns is not None, "record() was called before"
        self._run(inputs, Tape(self.num_blocks, hidden, self._returns, keep=False))

    @property
    def tower_weights(self) -> dict[str, Tensor]:
        """The weights that need statistics of the encoders of images, by their names in the model."""
        return {spec.place: self._around[spec.place] for spec in self.plan.weights if spec.is_tower}

    def before_blocks(self, inputs: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Tensor:
        """Return the hidden states before the first block, [1, T, D], differentiable in weights of the encoders.

        Raises:
            BadInput: blocks get more of the encoders than these hidden states.
        """
        assert self._returns is not None, "record() was called before"
        tape = Tape(self.num_blocks, None, self._returns, keep=False, has_graph=True)
        self._run(inputs, tape, weights)
        assert tape.hidden is not None, "record() has seen the blocks"
        return tape.hidden

    def _run(
        self, inputs: Mapping[str, Tensor], tape: Tape, weights: Mapping[str, Tensor] = MappingProxyType({})
    ) -> Any:
        self._tapes.append(tape)
        try:
            with torch.enable_grad():
                return functional_call(self._model, self._around | dict(weights), (), dict(inputs))
        except AllCalled:
            return None
        except (torch.OutOfMemoryError, ValueError):
            raise
        except BUILD_ERRORS as error:
            length = inputs["input_ids"].shape[-1]
            raise BadInput(
                f"{self.plan.architecture} cannot be run on a text of {length} tokens: {first_line(error)}; try a "
                "smaller --max-length"
            ) from error
        finally:
            self._tapes.pop()

    def _returned_by_a_block(self, inputs: Mapping[str, Tensor]) -> int:
        """Run the first block once; return the length of the tuple that it returns, or 0 for a tensor."""
        tape = Tape(1, None, 0, keep=True)
        self._run(inputs, tape)
        if tape.hidden is None:
            raise BadInput(f"{self.plan.architecture} calls no block for a text; give a model that reads texts")
        call = tape.calls[0]
        with torch.no_grad():
            returned = call.run(self._empty[call.path], self.read_block(call.path), tape.hidden)
        first, length = (returned, 0) if isinstance(returned, Tensor) else (returned[0], len(returned))
        if not isinstance(first, Tensor) or first.shape != tape.hidden.shape:
            raise BadInput(f"{call.path} does not return the next hidden states, so {NOT_ALONE}")
        return length

    def _read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Read tensors to the device, floating point ones in the compute dtype; tied names share one tensor."""
        experts: dict[str, Tensor] = {}
        for spec in (spec for name in names for spec in self._stacks.get(name, ())):
            experts[f"{spec.module}.weight"] = self.checkpoint.read_weight(spec).to(self.device, self.dtype)
        names = [name for name in names if name not in self._stacks]
        read: dict[str, Tensor] = {}
        for name in names:
            spelled = _spelled(name, self.plan)
            if spelled is not None and spelled not in read:
                tensor = self.checkpoint.read(spelled)
                read[spelled] = tensor.to(self.device, self.dtype if tensor.is_floating_point() else tensor.dtype)
        found = {name: read[spelled] for name in names if (spelled := _spelled(name, self.plan)) is not None}
        return experts | found


def _build(checkpoint: Checkpoint, plan: ModelPlan, device: torch.device, *, twice: bool) -> Any:
    """Return the model with parameters on the meta device, and buffers as transformers makes them on the device."""
    import transformers
    from accelerate import init_empty_weights

    config: Any = copy.deepcopy(checkpoint.config)
    for one in {id(c): c for c in (config, config.get_text_config())}.values():
        one.use_cache = False  # blocks are run again, and must not use keys and values of the run before
    try:
        with init_empty_weights(include_buffers=False):
            model = getattr(transformers, plan.architecture)(config)
        if twice:
            model.set_attn_implementation("eager")
    except BUILD_ERRORS as error:
        raise BadInput(f"transformers cannot build {plan.architecture}: {first_line(error)}") from error
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    return model.requires_grad_(False).eval()


def _block_paths(model: nn.Module, plan: ModelPlan) -> list[str]:
    """Return the paths of all elements of the lists of language blocks with a weight to split, in model order."""
    lists = {block_of(spec.module).rpartition(".")[0] for spec in plan.weights if not spec.is_tower}
    return [f"{parent}.{name}" for parent in sorted(lists) for name, _ in model.get_submodule(parent).named_children()]


def _spelled(name: str, plan: ModelPlan) -> str | None:
    """Return the name in the checkpoint of a tensor of the model, or of a tensor that it is tied to."""
    source = plan.tied.get(name, name)
    alike = (name, source, *(other for other, one in plan.tied.items() if one == source))
    return next((plan.spelling[one] for one in alike if one in plan.spelling), None)


def _open_experts(model: nn.Module, path: str, experts: Sequence[WeightSpec]) -> None:
    """Replace a stack by a list of linear layers without memory."""
    open_stack(model, path, len(experts))
    for spec in experts:
        rows, columns = spec.shape
        linear = nn.Linear(columns, rows, bias=False, device="meta").requires_grad_(False)
        model.set_submodule(spec.module, linear, strict=True)


def _check_readable(model: nn.Module, plan: ModelPlan, stacks: Mapping[str, Sequence[WeightSpec]]) -> None:
    """Refuse parameters that transformers would compute or draw at random on loading."""
    experts = {f"{spec.module}.weight" for specs in stacks.values() for spec in specs}
    named = (name for name, _ in model.named_parameters() if name not in experts)
    absent = [name for name in named if _spelled(name, plan) is None]
    if absent:
        raise BadInput(
            f"{len(absent)} tensors of {plan.architecture} are not in the checkpoint as they are in the model "
            f"({listing(absent)}): transformers merges them or draws them at random on loading; such a "
            "model cannot be calibrated"
        )
