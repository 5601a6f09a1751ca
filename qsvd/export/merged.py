"""Export a trained model as a plain 16-bit checkpoint: W' = gain * (Q + B A) in float32, rounded once.

One weight at a time is in memory. A killed run continues with the first shard that is missing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qsvd.errors import BadInput, listing
from qsvd.export.trained import (
    HEADER_BYTES,
    ExportFolder,
    TrainedModel,
    check_dtype,
    disk_bytes,
    rounded,
    size_of,
    take_inventory,
)
from qsvd.files.atomic import read_object, write_json
from qsvd.files.quantize_folder import PYTORCH
from qsvd.files.readers import is_whole
from qsvd.files.safetensors import DTYPE_NAMES, NewTensor, new_tensor, read_tensor, write_stream
from qsvd.files.source import copy_files, open_checkpoint
from qsvd.files.workspace import MANIFEST


@dataclass(frozen=True)
class MergedExport:
    """The result of `write_merged`."""

    weights: int  # that were merged
    full: int  # tensors that were trained in full
    shards: int
    dtype: str  # of merged weights, "bfloat16"
    num_bytes: int  # of all tensors


@dataclass(frozen=True)
class MergedForm:
    """The form of a merged checkpoint.

    Args:
        dtype: float32, bfloat16 or float16; None is that of the weights in the 16-bit model. Tensors that had another
            dtype there keep it.
        shard_bytes: Maximum size of a file; a larger tensor has a file of its own.
        config_changes: Entries of config.json to replace or add, such as the architectures of a classifier.
    """

    dtype: torch.dtype | None = None
    shard_bytes: int = 5 * 10**9
    config_changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """Rows of a weight, by its tensor in the quantized model, and their place in the 16-bit model (docs/format.md)."""

    weight: str
    rows: slice
    source: Mapping[str, Any]


def write_merged(model: TrainedModel, folder: Path, form: MergedForm) -> MergedExport:
    """Write a checkpoint that needs neither qsvd nor PEFT nor bitsandbytes.

    Args:
        model: Read twice, one weight at a time.
        folder: Does not exist, is empty, or was left by the same export.

    Raises:
        BadInput: the trained values are not usable, or outside the range of the dtype; a parameter trained in full is
            new or has a new shape, and the config is not changed; the folder holds something else.
        DoesNotFit: the files do not fit on the disk.
    """
    stored = model.split.stored_dtype
    dtype = form.dtype or stored
    check_dtype(dtype)
    inventory = take_inventory(model)
    check_full(model, form)
    shards = shards_of(tensors_of(model, stored, dtype), form.shard_bytes)
    name = str(dtype).removeprefix("torch.")
    sizes = [size_of(tensors) for tensors in shards.values()]
    result = MergedExport(len(inventory.ranks), len(model.full), len(shards), name, sum(sizes))
    identity = {"to": "merged", "base": model.split.fingerprint, "trained": inventory.digest, "dtype": name}
    identity |= {"shard_bytes": form.shard_bytes, "config_changes": dict(form.config_changes)}
    copied = [file for file in open_checkpoint(str(model.split.folder)).other_files if file.name != MANIFEST]
    most_bytes = sum(disk_bytes(tensors) for tensors in shards.values()) + sum(file.stat().st_size for file in copied)
    with ExportFolder(folder, identity, most_bytes) as export:
        if not export.is_complete:
            write_shards(folder, shards)
            copy_files(copied, folder)
            config = read_object(model.split.folder / "config.json") | {"dtype": name} | dict(form.config_changes)
            dropped = ("quantization_config", "torch_dtype")  # the second is the older name of dtype
            write_json(folder / "config.json", {key: v for key, v in config.items() if key not in dropped})
            export.finish(asdict(result))
    return result


def check_full(model: TrainedModel, form: MergedForm) -> None:
    """Refuse parameters that do not fit the config of the quantized model."""
    others = model.others()
    changed = []
    for name, tensor in model.full.items():
        entry = others.get(model.spelling.get(name, name))
        if entry is None:
            changed.append(f"{name} is not in the quantized model")
        elif entry.shape != tuple(tensor.shape):
            changed.append(f"{name} is {list(tensor.shape)} instead of {list(entry.shape)}")
    if changed and not form.config_changes:
        raise BadInput(
            f"{listing(changed)}: the config.json of {model.split.folder} describes another model; give config_changes "
            "with the architectures and sizes of the trained model"
        )


def tensors_of(model: TrainedModel, stored: torch.dtype, dtype: torch.dtype) -> list[NewTensor]:
    """Return every tensor of the export: those of the quantized model in its order, then new ones."""
    full = {model.spelling.get(name, name): tensor for name, tensor in model.full.items()}
    others = model.others()
    recast = DTYPE_NAMES[stored] if stored != dtype else None  # tensors of other dtypes are copied as they are

    def read(name: str) -> Tensor:
        return read_tensor(others[name])

    new, composed = list[NewTensor](), _composed(model)
    for name, entry in model.split.tensors.items():
        if name in model.split.weights:
            new += _merged(model, name, composed, dtype)
        elif name in model.split.tables and name not in full:
            shape = tuple(model.split.tables[name]["shape"])
            new.append(NewTensor(name, DTYPE_NAMES[dtype], shape, partial(_made, model.split.dense, name, dtype)))
        elif name in others and name not in full and entry.dtype == recast:
            new.append(NewTensor(name, DTYPE_NAMES[dtype], entry.shape, partial(_made, read, name, dtype)))
        elif name in others and name not in full:
            new.append(new_tensor(name, entry))
    for name, tensor in full.items():
        new.append(new_tensor(name, rounded(tensor.detach().cpu(), dtype, name)))
    return new


def _merged(model: TrainedModel, name: str, composed: dict[str, list[Part]], dtype: torch.dtype) -> list[NewTensor]:
    """Return the tensors of the 16-bit model that a weight is in and that were not returned with another weight."""
    weight = model.split.weights[name]
    if "sources" not in weight:
        return [NewTensor(name, DTYPE_NAMES[dtype], tuple(weight["shape"]), partial(_made, model.dense, name, dtype))]
    new = []
    for source in weight["sources"]:
        if parts := composed.pop(source["tensor"], None):
            made = partial(_put_together, model, parts, source["shape"], dtype)
            new.append(NewTensor(source["tensor"], DTYPE_NAMES[dtype], tuple(source["shape"]), made))
    return new


def _composed(model: TrainedModel) -> dict[str, list[Part]]:
    """Return the parts of each tensor of the 16-bit model that had several weights, or a part of one."""
    parts: dict[str, list[Part]] = {}
    for name, weight in model.split.weights.items():
        start = 0
        for source in weight.get("sources", ()):
            stored = source["shape"][-1 if source["is_transposed"] else -2]
            stop = start + (stored if source["rows"] is None else source["rows"][1] - source["rows"][0])
            parts.setdefault(source["tensor"], []).append(Part(name, slice(start, stop), source))
            start = stop
    return parts


def _put_together(model: TrainedModel, parts: Sequence[Part], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a tensor of the 16-bit model from the rows of trained weights."""
    whole = torch.empty(tuple(shape), dtype=dtype)
    for part in parts:
        source, values = part.source, rounded(model.dense(part.weight)[part.rows], dtype, part.weight)
        place = whole if source["index"] is None else whole[source["index"]]
        place = place if source["rows"] is None else place[slice(*source["rows"])]
        place.copy_(values.T if source["is_transposed"] else values)
    return whole


def _made(read: Callable[[str], Tensor], name: str, dtype: torch.dtype) -> Tensor:
    return rounded(read(name), dtype, name)


def shards_of(new: Sequence[NewTensor], most_bytes: int) -> dict[str, list[NewTensor]]:
    """Return the tensors of every file: in their order, up to `most_bytes` a file; a larger tensor has its own."""
    groups: list[list[NewTensor]] = [[]]
    total = 0
    for tensor in new:
        size = size_of([tensor]) + HEADER_BYTES
        if groups[-1] and total + size > most_bytes:
            groups.append([])
            total = 0
        groups[-1].append(tensor)
        total += size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{n:05d}-of-{len(groups):05d}.safetensors": group for n, group in enumerate(groups, start=1)}


def write_shards(folder: Path, shards: Mapping[str, Sequence[NewTensor]]) -> None:
    """Write the files that are missing or damaged, and the index of several."""
    for file, tensors in shards.items():
        if not is_whole(folder / file):
            write_stream(folder / file, tensors, PYTORCH)
    if len(shards) > 1:
        write_index(folder, shards)


def write_index(folder: Path, shards: Mapping[str, Sequence[NewTensor]]) -> None:
    """Write the index of the files: which tensor is in which."""
    weight_map = {tensor.name: file for file, tensors in shards.items() for tensor in tensors}
    total = sum(size_of(tensors) for tensors in shards.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)
