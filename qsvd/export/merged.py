"""A trained model as a plain 16-bit checkpoint: W' = gain * (Q + B A) in float32, rounded once, shard by shard.

In memory are one weight and what it is made of. A killed run goes on at the first shard that is not there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qsvd.errors import BadInput, listing
from qsvd.export.folder import HEADER_BYTES, ExportFolder, disk_bytes, size_of
from qsvd.export.trained import TrainedModel, check_dtype, rounded, take_inventory
from qsvd.files.atomic import read_object, whole_file, write_json
from qsvd.files.output import PYTORCH
from qsvd.files.safetensors import DTYPE_NAMES, NewTensor, TensorEntry, new_tensor, read_tensor, write_stream
from qsvd.files.source import open_checkpoint
from qsvd.files.workspace import MANIFEST


@dataclass(frozen=True)
class MergedExport:
    """What `write_merged` wrote.

    Args:
        weights: Number of weights that were merged.
        full: Number of tensors that were trained in full, which replace others or are new.
        shards: Number of weight files.
        dtype: Of merged weights, "bfloat16".
        num_bytes: Of all tensors.
    """

    weights: int
    full: int
    shards: int
    dtype: str
    num_bytes: int


@dataclass(frozen=True)
class MergedForm:
    """How a merged checkpoint is written.

    Args:
        dtype: float32, bfloat16 or float16; None is that of the weights before they were split. Tensors that the source
            kept in another dtype than its weights keep it.
        shard_bytes: Most bytes of one file; a larger tensor has its own.
        config_changes: Entries of config.json to replace or add, such as architectures, id2label and label2id of a
            classifier.
    """

    dtype: torch.dtype | None = None
    shard_bytes: int = 5 * 10**9
    config_changes: Mapping[str, Any] = field(default_factory=dict)


def write_merged(model: TrainedModel, folder: Path, form: MergedForm) -> MergedExport:
    """Write a checkpoint that needs neither qsvd nor PEFT nor bitsandbytes.

    Args:
        model: What was trained; read twice, one weight at a time.
        folder: Empty or not there, or left by the same export.
        form: How it is written.

    Raises:
        BadInput: the trained values are not usable, or beyond the range of the dtype; a parameter trained in full is
            new or has a new shape without changes of the config; the folder holds something else, or does not fit on
            the disk.
    """
    stored = model.split.stored_dtype
    dtype = form.dtype or stored
    check_dtype(dtype)
    inventory = take_inventory(model)
    _check_full(model, form)
    shards = _shards(_tensors(model, stored, dtype), form.shard_bytes)
    name = str(dtype).removeprefix("torch.")
    sizes = [size_of(tensors) for tensors in shards.values()]
    result = MergedExport(len(inventory.ranks), len(model.full), len(shards), name, sum(sizes))
    identity = {"to": "merged", "base": model.split.fingerprint, "trained": inventory.digest, "dtype": name}
    identity |= {"shard_bytes": form.shard_bytes, "config_changes": dict(form.config_changes)}
    copied = [file for file in open_checkpoint(str(model.split.folder)).other_files if file.name != MANIFEST]
    most_bytes = sum(disk_bytes(tensors) for tensors in shards.values()) + sum(file.stat().st_size for file in copied)
    with ExportFolder(folder, identity, most_bytes) as export:
        if not export.is_complete:
            _write_shards(folder, shards)
            for file in copied:
                with whole_file(folder / file.name) as target:
                    target.write(file.read_bytes())
            config = _config(model) | {"dtype": name} | dict(form.config_changes)
            dropped = ("quantization_config", "torch_dtype")  # the second is the older name of dtype
            write_json(folder / "config.json", {key: v for key, v in config.items() if key not in dropped})
            export.finish(asdict(result))
    return result


def _config(model: TrainedModel) -> dict[str, Any]:
    return read_object(model.split.folder / "config.json")


def _check_full(model: TrainedModel, form: MergedForm) -> None:
    """Refuse parameters that the model of the base's own config would not load."""
    others = model.others()
    changed = []
    for name, tensor in model.full.items():
        entry = others.get(model.spelling.get(name, name))
        if entry is None:
            changed.append(f"{name} is not in the base")
        elif entry.shape != tuple(tensor.shape):
            changed.append(f"{name} is {list(tensor.shape)} instead of {list(entry.shape)}")
    if changed and not form.config_changes:
        raise BadInput(
            f"{listing(changed)}: the base's config.json describes another model; give config_changes, the "
            "architectures and sizes of the trained one"
        )


def _tensors(model: TrainedModel, stored: torch.dtype, dtype: torch.dtype) -> list[NewTensor]:
    """Every tensor of the result, the base's in its order, then new ones; made or copied when its turn comes."""
    full = {model.spelling.get(name, name): tensor for name, tensor in model.full.items()}
    others = model.others()
    new = []
    for name, entry in model.split.tensors.items():
        if name in model.split.weights:
            shape = tuple(model.split.weights[name]["shape"])
            new.append(NewTensor(name, DTYPE_NAMES[dtype], shape, partial(_merged, model, name, dtype)))
        elif name in others and name not in full:
            new.append(new_tensor(entry.name, entry) if entry.dtype != DTYPE_NAMES[stored] else _cast(entry, dtype))
    for name, tensor in full.items():
        values = rounded(tensor.detach().cpu(), dtype, name)
        new.append(NewTensor(name, DTYPE_NAMES[dtype], tuple(values.shape), values))
    return new


def _merged(model: TrainedModel, name: str, dtype: torch.dtype) -> Tensor:
    return rounded(model.dense(name), dtype, name)


def _cast(entry: TensorEntry, dtype: torch.dtype) -> NewTensor:
    """A tensor of the base in another dtype; its bytes, if it has that dtype already."""
    if entry.dtype == DTYPE_NAMES[dtype]:
        return new_tensor(entry.name, entry)

    def make() -> Tensor:
        return rounded(read_tensor(entry), dtype, entry.name)

    return NewTensor(entry.name, DTYPE_NAMES[dtype], entry.shape, make)


def _shards(new: Sequence[NewTensor], most_bytes: int) -> dict[str, list[NewTensor]]:
    """Files in the order of the tensors, each up to `most_bytes`; a tensor larger than that has its own."""
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


def _write_shards(folder: Path, shards: Mapping[str, Sequence[NewTensor]]) -> None:
    """The files that are not there yet, and the index of all."""
    for file, tensors in shards.items():
        if not (folder / file).is_file():
            write_stream(folder / file, tensors, PYTORCH)
    if len(shards) > 1:
        weight_map = {tensor.name: file for file, tensors in shards.items() for tensor in tensors}
        total = sum(size_of(tensors) for tensors in shards.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / "model.safetensors.index.json", index)
