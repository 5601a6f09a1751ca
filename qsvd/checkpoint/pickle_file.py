"""Tensors of a pytorch_model.bin, for checkpoints without safetensors. Unpickled with weights_only: no code runs."""

import pickle
from dataclasses import dataclass
from pathlib import Path

import torch

from qsvd.checkpoint.tensor_file import DTYPE_NAMES
from qsvd.plan.listing import first_line


@dataclass(frozen=True)
class PickleEntry:
    """One tensor of a pickled file; it has no place of its own in the file, only a name."""

    name: str
    dtype: str  # as safetensors spells it, "BF16"
    shape: tuple[int, ...]
    file: Path
    num_bytes: int


def read_pickle_header(path: Path) -> dict[str, PickleEntry]:
    """The tensors of the file by name.

    Raises:
        ValueError: the file is damaged, of a form that cannot be mapped, or holds something other than named tensors.
    """
    entries = {}
    for name, tensor in _load(path).items():
        if not isinstance(tensor, torch.Tensor) or tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"{path}: {name} is no dense tensor; save the model's state_dict as safetensors")
        num_bytes = tensor.numel() * tensor.element_size()
        entries[name] = PickleEntry(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), path, num_bytes)
    return entries


def read_pickled(entry: PickleEntry) -> torch.Tensor:
    """The tensor, in memory of its own. The file is mapped only while it is copied."""
    return _load(entry.file)[entry.name].clone(memory_format=torch.contiguous_format)


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        table = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} is truncated or no PyTorch file that weights_only can map ({first_line(error)}); "
            "download it again, or save the model as safetensors"
        ) from error
    if not isinstance(table, dict):
        raise ValueError(f"{path} holds a {type(table).__name__}, not tensors by name; save the model as safetensors")
    return table
