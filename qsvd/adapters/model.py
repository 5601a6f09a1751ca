"""A transformers model with SplitLinear inside: what it trains, and how that is saved."""

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qsvd.adapters.linear import SplitLinear
from qsvd.errors import BadInput, listing
from qsvd.files.adapter import AdapterFolder, AdapterRecord, write_adapter
from qsvd.files.safetensors import read_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Layer-major accumulation: a block sees all micro-batches of a step before the next block sees any.


def in_micro_batches(rows: int, checkpoint: Callable[..., Any], block: Any, *inputs: Any) -> Any:
    """What a block returns for a batch, computed for so many rows at a time.

    Args:
        checkpoint: As torch.utils.checkpoint.checkpoint: a function and its inputs.
        block: A partial of the block's forward that holds its keyword arguments, as transformers gives it.
        inputs: Its positional arguments, the hidden states [batch, tokens, hidden] first. Of all arguments, tensors
            with as many rows as these are divided, the others are the same for every part.
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
    """Of a tensor, or of the tensors in a tuple, what belongs to these rows of the batch."""
    if isinstance(value, Tensor):
        return value[start:stop] if value.ndim and len(value) == total else value
    if isinstance(value, tuple):
        return tuple(_rows(one, total, start, stop) for one in value)
    return value


def _joined(outputs: list[Any], rows: int) -> Any:
    """The parts' outputs as the whole batch's: tensors one below the other, in tuples where there are some.

    A tensor of one row from parts of several, as T5's position bias, is the same for all of them.
    """
    first = outputs[0]
    if isinstance(first, tuple):
        return tuple(_joined(list(one), rows) for one in zip(*outputs, strict=True))
    if not isinstance(first, Tensor) or (first.ndim and len(first) == 1 != rows):
        return first
    return torch.cat(outputs)


ADAPTER = ".adapter."  # between a module's path and the name of an adapter's parameter


class SplitModel:
    """Goes before a transformers class: `class SplitLlama(SplitModel, LlamaForCausalLM)`.

    The model is the transformers class in every other respect.
    """

    split_record: AdapterRecord
    micro_batch: int | None = None  # rows that a block computes with at a time in training; None is all

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, every_n_layers: int = 1
    ) -> None:
        if self.micro_batch is not None:
            gradient_checkpointing_func = partial(in_micro_batches, self.micro_batch, gradient_checkpointing_func)
        above: Any = super()
        above._set_gradient_checkpointing(enable, gradient_checkpointing_func, every_n_layers)

    def save_pretrained(self, save_directory: str | Path, *_: object, **__: object) -> None:
        """Save what is trained, a few MB; `qsvd.load(BASE, adapter=save_directory)` brings it back.

        transformers' other arguments, which are about files of whole models, change nothing.
        """
        write_adapter(Path(save_directory), self.split_record, trained(cast("PreTrainedModel", self)))

    @property
    def transformers_class(self) -> Any:
        """The class that this one goes before."""
        return type(self).__mro__[2]

    def reference(self) -> "PreTrainedModel":
        """This model as it is now, frozen, for trainers that compare with one (TRL's `ref_model`).

        It shares the residuals, embeddings and everything else that is not trained: it costs the adapter again.
        """
        model = cast("PreTrainedModel", self)
        shared: dict[int, Any] = {id(p): p for p in model.parameters() if not p.requires_grad}
        shared |= {id(buffer): buffer for buffer in model.buffers()}
        return copy.deepcopy(model, shared).requires_grad_(False).eval()


def split_linears(model: nn.Module) -> Iterator[tuple[str, SplitLinear]]:
    """Path and module of every split weight, in model order."""
    for path, module in model.named_modules():
        if isinstance(module, SplitLinear):
            yield path, module


def moved_bytes(model: nn.Module) -> int:
    """Bytes of pages that were brought to the device so far."""
    caches = {id(linear.paged.cache): linear.paged.cache for _, linear in split_linears(model) if linear.paged}
    return sum(cache.moved_bytes for cache in caches.values())


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Every trained parameter by its name on disk, "model.layers.0.self_attn.q_proj.up"."""
    return {name.replace(ADAPTER, "."): p for name, p in model.named_parameters() if p.requires_grad}


def restore(model: nn.Module, adapter: AdapterFolder) -> None:
    """Give the trained parameters the values of a folder.

    Raises:
        BadInput: the folder lacks parameters of the model, has others, or of other shapes.
    """
    parameters = trained(model)
    _check_names(parameters, adapter)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(read_tensor(adapter.tensors[name]))


def _check_names(parameters: Mapping[str, Tensor], adapter: AdapterFolder) -> None:
    found = adapter.tensors
    missing = sorted(set(parameters) - set(found))
    strange = sorted(set(found) - set(parameters))
    reshaped = sorted(n for n in set(parameters) & set(found) if tuple(parameters[n].shape) != found[n].shape)
    sentences = [
        f"{len(names)} parameters {what}: {listing(names)}"
        for what, names in (("are missing", missing), ("are unknown", strange), ("have other shapes", reshaped))
        if names
    ]
    if sentences:
        raise BadInput(f"{adapter.folder} does not fit the model: {'; '.join(sentences)}")


# Token embeddings that stay in host memory: 2 GB of a 70B model, of which a batch needs a few rows.


class HostEmbedding(nn.Module):
    """The embedding of a model, looked up on the host; its rows go to the device.

    Args:
        embedding: On the CPU. It is kept outside of torch's list of modules, so that `model.to` leaves it there.
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
        """[...] to [..., hidden]."""
        return self._outside[0](tokens.cpu()).to(self._device, non_blocking=True)

    def __deepcopy__(self, memo: dict) -> "HostEmbedding":
        """Itself: it is frozen."""
        return self
