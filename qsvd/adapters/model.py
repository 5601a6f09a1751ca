"""A transformers model with SplitLinear layers: its trained parameters, and how they are saved and restored."""

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from qsvd.adapters.linear import SplitLinear
from qsvd.adapters.pages.sharded import ShardedPages
from qsvd.adapters.tables import TiedHead
from qsvd.errors import BadInput, listing
from qsvd.files.adapter import AdapterFolder, AdapterRecord, write_adapter
from qsvd.files.safetensors import new_tensors, read_tensor, write_stream
from qsvd.memory.items import block_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Layer-major accumulation: a block computes all micro-batches of a step before the next block begins.


def in_micro_batches(rows: int, checkpoint: Callable[..., Any], block: Any, *inputs: Any) -> Any:
    """Return the output of a block for a batch, computed for `rows` rows at a time.

    Args:
        checkpoint: Called like torch.utils.checkpoint.checkpoint, with a function and its inputs.
        block: A partial of the block's forward with its keyword arguments, as transformers passes it.
        inputs: Positional arguments, the hidden states [batch, tokens, hidden] first. Tensors with as many rows are
            divided, all other arguments are the same for every part.
    """
    total = len(inputs[0])
    if total <= rows:
        return checkpoint(block, *inputs)
    outputs = []
    for start in range(0, total, rows):
        named = {name: _rows(value, total, start, start + rows) for name, value in block.keywords.items()}
        part = partial(block.func, *block.args, **named)
        outputs.append(checkpoint(part, *(_rows(value, total, start, start + rows) for value in inputs)))
    return _joined(outputs, rows)


def _rows(value: Any, total: int, start: int, stop: int) -> Any:
    """Return these rows of a tensor, or of the tensors in a tuple."""
    if isinstance(value, Tensor):
        return value[start:stop] if value.ndim and len(value) == total else value
    if isinstance(value, tuple):
        return tuple(_rows(one, total, start, stop) for one in value)
    return value


def _joined(outputs: list[Any], rows: int) -> Any:
    """Return the outputs of the parts as that of the batch: tensors concatenated, also inside tuples.

    A tensor of one row from parts of several rows, like T5's position bias, is the same for all parts.
    """
    first = outputs[0]
    if isinstance(first, tuple):
        return tuple(_joined(list(one), rows) for one in zip(*outputs, strict=True))
    if not isinstance(first, Tensor) or (first.ndim and len(first) == 1 != rows):
        return first
    return torch.cat(outputs)


WEIGHTS = "model.safetensors"  # of a checkpoint of transformers' Trainer
ADAPTER = ".adapter."  # between a module's path and the name of an adapter's parameter


NO_PEFT = (
    "a model from qsvd.load has an adapter already: leave out peft_config, and choose the method and rank with "
    'qsvd.load(OUT, options=qsvd.AdapterOptions("lora", rank=16)); for PEFT\'s own layers open OUT with '
    "AutoModelForCausalLM.from_pretrained"
)


class SplitModel:
    """Mixin before a transformers class: `class SplitLlama(SplitModel, LlamaForCausalLM)`."""

    split_record: AdapterRecord
    trained_template: str | None = None  # the chat template of the training data, if not the tokenizer's
    micro_batch: int | None = None  # rows that a block computes at a time in training; None is all
    unrecomputed: int = 0  # blocks that keep their activations where the others are recomputed: the last ones

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, every_n_layers: int = 1
    ) -> None:
        if self.micro_batch is not None:
            gradient_checkpointing_func = partial(in_micro_batches, self.micro_batch, gradient_checkpointing_func)
        above: Any = super()
        above._set_gradient_checkpointing(enable, gradient_checkpointing_func, every_n_layers)
        blocks = split_blocks(cast("PreTrainedModel", self))
        for block in blocks[len(blocks) - self.unrecomputed :]:
            for module in block.modules():
                if isinstance(module, GradientCheckpointingLayer):
                    module.gradient_checkpointing = False

    @property
    def base_model(self) -> nn.Module:
        """The part below the output head; a few classes of transformers (Llama 4) name none, and TRL needs it."""
        model = cast("PreTrainedModel", self)
        named = getattr(model, model.base_model_prefix, model)
        if named is not model or not model.can_generate():
            return named
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        while any(module is head for module in named.modules()):
            parts = (part for part in named.children() if part is not embedding)
            inner = next((part for part in parts if any(module is embedding for module in part.modules())), None)
            if inner is None:  # the head is beside the embedding, as in T5
                break
            named = inner
        return named

    def save_pretrained(
        self, save_directory: str | Path, *_: object, is_main_process: object = None, **__: object
    ) -> None:
        """Save the adapter, a few MB; `qsvd.load(OUT, adapter=save_directory)` loads it.

        transformers' other arguments concern files of whole models and are ignored.

        Args:
            is_main_process: Given by transformers' Trainer. The same tensors are then in model.safetensors, too, which
                is the file that it reads to resume a run and to load the best model.
        """
        model, folder = cast("PreTrainedModel", self), Path(save_directory)
        tensors = saved(model)
        write_adapter(folder, self.split_record, tensors, self.trained_template)
        if is_main_process is not None:
            mine = {
                name: tensor for name, tensor in model.state_dict().items() if name.replace(ADAPTER, ".") in tensors
            }
            write_stream(folder / WEIGHTS, new_tensors(mine), {"format": "pt"})

    def load_state_dict(self, state_dict: Mapping[str, Any], *arguments: Any, **options: Any) -> Any:
        """Load tensors as torch does; frozen ones that are not among them are not missing, since OUT has them."""
        above, model = cast("Any", super()), cast("PreTrainedModel", self)
        found = above.load_state_dict(state_dict, *arguments, **options)
        learned = {name for name, p in model.named_parameters() if p.requires_grad}
        found.missing_keys[:] = [name for name in found.missing_keys if name in learned]
        for _, linear in split_linears(model):
            linear.adapter.forget()
        return found

    def is_custom_code(self) -> bool:
        """Refuse PEFT's layers: of a loaded model, PEFT asks this (in transformers) before it adds layers.

        transformers itself asks it while it makes the model.
        """
        if "split_record" in self.__dict__ and next(split_linears(cast("PreTrainedModel", self)), None):
            raise BadInput(NO_PEFT)
        return False

    def add_adapter(self, *_: object, **__: object) -> None:
        """Refuse transformers' way to add PEFT's layers."""
        raise BadInput(NO_PEFT)

    load_adapter = add_adapter

    @property
    def transformers_class(self) -> Any:
        """The transformers class of the model."""
        classes = type(self).__mro__
        return classes[classes.index(SplitModel) + 1]

    def reference(self) -> "PreTrainedModel":
        """Return a frozen copy of this model, for trainers with a reference model (TRL's `ref_model`).

        It shares all frozen tensors, so that it costs the memory of the adapter only.
        """
        model = cast("PreTrainedModel", self)
        shared: dict[int, Any] = {id(p): p for p in model.parameters() if not p.requires_grad}
        shared |= {id(buffer): buffer for buffer in model.buffers()}
        return copy.deepcopy(model, shared).requires_grad_(False).eval()


def split_linears(model: nn.Module) -> Iterator[tuple[str, SplitLinear]]:
    """Yield path and module of every SplitLinear, in model order."""
    for path, module in model.named_modules():
        if isinstance(module, SplitLinear):
            yield path, module


def split_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks that have SplitLinear layers, in model order."""
    paths = dict.fromkeys(block_of(path) for path, _ in split_linears(model))
    return [model.get_submodule(path) for path in paths]


def share_pages(model: nn.Module) -> None:
    """Let each process keep its part of residuals that several processes hold together; see ShardedPages.

    Raises:
        BadInput: the model cannot be divided so.
    """
    layers = [(block_of(path), linear.paged) for path, linear in split_linears(model) if linear.paged is not None]
    if layers and isinstance(pages := layers[0][1].cache, ShardedPages):
        pages.attach(model, cast("Any", model).base_model, [(path, paged.page) for path, paged in layers])


def is_sharded(model: nn.Module) -> bool:
    """Return whether several processes hold the residuals together."""
    return any(linear.paged and isinstance(linear.paged.cache, ShardedPages) for _, linear in split_linears(model))


def moved_bytes(model: nn.Module) -> int:
    """Return the bytes of pages that were copied to the device so far."""
    caches = {id(linear.paged.cache): linear.paged.cache for _, linear in split_linears(model) if linear.paged}
    return sum(cache.moved_bytes for cache in caches.values())


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Return every trained parameter by its name on disk, "model.layers.0.self_attn.q_proj.up"."""
    return {name.replace(ADAPTER, "."): p for name, p in model.named_parameters() if p.requires_grad}


def saved(model: nn.Module) -> dict[str, Tensor]:
    """Return what a folder of the adapter holds: what is trained, and what adapters start from and no file has.

    What weights have in common is there once, under the first of them.
    """
    started: dict[str, Tensor] = {}
    seen = set[tuple[str, str]]()
    for path, linear in split_linears(model):
        adapter = linear.adapter
        for name in adapter.state_dict().keys() - dict(adapter.named_parameters()).keys():
            owner = adapter.family if adapter.family and name in adapter.in_common else path
            if (owner, name) not in seen:
                started[f"{path}.{name}"] = adapter.get_buffer(name)
            seen.add((owner, name))
    return trained(model) | dict(sorted(started.items()))


def trained_pairs(model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Return the trained pairs of factors, up [O, K] and down [K, I], in model order."""
    pairs = (linear.adapter.pair() for _, linear in split_linears(model))
    return [pair for pair in pairs if pair is not None and all(factor.requires_grad for factor in pair)]


def restore(model: nn.Module, adapter: AdapterFolder) -> None:
    """Load the saved tensors from a folder.

    Raises:
        BadInput: the folder lacks tensors of the model, has others, or of other shapes.
    """
    tensors = saved(model)
    _check_names(tensors, adapter)
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(read_tensor(adapter.tensors[name]))
    for _, linear in split_linears(model):
        linear.adapter.forget()


def _check_names(parameters: Mapping[str, Tensor], adapter: AdapterFolder) -> None:
    found = adapter.tensors
    missing = sorted(set(parameters) - set(found))
    strange = sorted(set(found) - set(parameters))
    reshaped = sorted(n for n in set(parameters) & set(found) if tuple(parameters[n].shape) != found[n].shape)
    problems = (("are missing", missing), ("are unknown", strange), ("have other shapes", reshaped))
    if sentences := [f"{len(names)} parameters {what}: {listing(names)}" for what, names in problems if names]:
        raise BadInput(f"{adapter.folder} does not fit the model: {'; '.join(sentences)}")


class HostEmbedding(nn.Module):
    """A token embedding in CPU memory (2 GB of a 70B model), which copies the rows of a batch to the device.

    Args:
        embedding: On the CPU. It is hidden from torch's list of modules, so that `model.to` does not move it.
    """

    def __init__(self, embedding: nn.Module, device: torch.device):
        super().__init__()
        self._outside = (embedding,)
        self._device = device

    @property
    def weight(self) -> Tensor:
        """[vocabulary, hidden], on the CPU."""
        return self._outside[0].get_parameter("weight")

    def forward(self, tokens: Tensor) -> Tensor:
        """Map [...] to [..., hidden]."""
        return self._outside[0](tokens.cpu()).to(self._device, non_blocking=True)

    def __deepcopy__(self, memo: dict) -> "HostEmbedding":
        """Return itself: it is frozen."""
        return self


def keep_embeddings(model: Any, device: torch.device) -> None:
    """Replace the embedding by one in CPU memory."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(head, TiedHead) or (head is not None and head.weight is embedding.weight):
        raise BadInput(
            f"the embedding of {type(model).__name__} is also its output head, which computes on the device; "
            "leave embeddings_on_host out"
        )
    model.set_input_embeddings(HostEmbedding(embedding, device))
