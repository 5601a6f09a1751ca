"""Export a run on a pruned model as the 16-bit model that it was pruned from, with the trained change (LoRAM).

W + dW, where dW = W' - Q - B0 A0 on kept channels and 0 on the others: the change alone, so that neither the error of
quantization nor the removed channels are in the result. It needs no product of two factors, so that every method whose
trained part is a matrix has it. One weight at a time is in memory.
"""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from qsvd.errors import BadInput, listing
from qsvd.export.merged import MergedExport, MergedForm, shards_of, write_shards
from qsvd.export.pruned import PrunedRecord
from qsvd.export.trained import ExportFolder, TrainedModel, check_dtype, disk_bytes, rounded, size_of, take_inventory
from qsvd.files.atomic import write_json
from qsvd.files.safetensors import DTYPE_NAMES, TORCH_DTYPES, NewTensor, TensorEntry, new_tensor
from qsvd.files.source import Checkpoint, copy_files


def change(model: TrainedModel, pruned: PrunedRecord, name: str) -> Tensor:
    """Return what training changed of a weight, float32 [O, I] of the original, with zeros at removed channels.

    Args:
        name: Of the weight's tensor in the quantized model.
    """
    weight = model.split.weights[name]
    change_PQ = model.dense(name) - model.split.dense(name)
    return pruned.place(weight["module"], tuple(weight["shape"])).change(change_PQ)


def write_recovered(
    model: TrainedModel, folder: Path, form: MergedForm, original: Checkpoint, pruned: PrunedRecord
) -> MergedExport:
    """Write the original checkpoint with the trained change.

    Args:
        model: Read twice, one weight at a time.
        folder: Does not exist, is empty, or was left by the same export.
        original: The model that was pruned.

    Raises:
        BadInput: the trained values are not usable, or outside the range of the dtype; a weight is stored in another
            form than transformers computes with; the folder holds something else.
        DoesNotFit: the files do not fit on the disk.
    """
    inventory = take_inventory(model)
    if absent := [name for name in model.split.weights if name not in original.tensors]:
        raise BadInput(
            f"{original.name} stores {listing(absent)} in another form than transformers computes with: use --to lora"
        )
    stored = TORCH_DTYPES[original.tensors[next(iter(model.split.weights))].dtype]
    dtype = form.dtype or stored
    check_dtype(dtype)
    new = _tensors(model, original, pruned, (stored, dtype))
    shards, name = shards_of(new, form.shard_bytes), str(dtype).removeprefix("torch.")
    result = MergedExport(len(inventory.ranks), len(model.full), len(shards), name, size_of(new))
    identity = {"to": "merged", "base": model.split.fingerprint, "trained": inventory.digest, "dtype": name}
    identity |= {"shard_bytes": form.shard_bytes, "config_changes": dict(form.config_changes)}
    identity |= {"source_fingerprint": original.fingerprint}
    most_bytes = disk_bytes(new) + sum(file.stat().st_size for file in original.other_files)
    with ExportFolder(folder, identity, most_bytes) as export:
        if not export.is_complete:
            write_shards(folder, shards)
            copy_files(original.other_files, folder)
            config = original.config_json | {"dtype": name} | dict(form.config_changes)
            write_json(folder / "config.json", {key: value for key, value in config.items() if key != "torch_dtype"})
            export.finish(asdict(result))
    return result


def _tensors(
    model: TrainedModel, original: Checkpoint, pruned: PrunedRecord, dtypes: tuple[torch.dtype, torch.dtype]
) -> Sequence[NewTensor]:
    """Return the tensors of the original in its order, changed where they were trained, then new ones.

    Args:
        dtypes: Of its weights, and of those to write; tensors of other dtypes are copied as they are.
    """
    stored, dtype = dtypes
    full = {model.spelling.get(name, name): tensor for name, tensor in model.full.items()}
    recast, new = DTYPE_NAMES[stored], list[NewTensor]()

    def made(name: str) -> Tensor:
        values = original.read(name)
        if name in model.split.weights:
            values = values.float() + change(model, pruned, name)
        return rounded(values, dtype, name)

    for name, entry in original.tensors.items():
        if name in model.split.weights or (entry.dtype == recast != DTYPE_NAMES[dtype] and name not in full):
            new.append(NewTensor(name, DTYPE_NAMES[dtype], entry.shape, partial(made, name)))
        elif name not in full:
            source = entry if isinstance(entry, TensorEntry) else partial(original.read, name)
            new.append(NewTensor(name, entry.dtype, entry.shape, source))
    return [*new, *(new_tensor(name, rounded(tensor.detach().cpu(), dtype, name)) for name, tensor in full.items())]
