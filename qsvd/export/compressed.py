"""Export a trained model as a compressed-tensors checkpoint with weights of 4 bits, which stock vLLM reads (W4A16).

Over a residual in int4 the codes stay as they are, and the trained factors are a LoRA in the same folder: nothing is
rounded again. Any other model is merged, W' = gain * (Q + B A), and W' is rounded to int4 with scales of least squared
error. What is written is compared with W' in both forms.

Shape suffixes: O = out features, I = in features.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qsvd.decompose.rounding import round_nearest
from qsvd.errors import BadInput, listing
from qsvd.export.merged import MergedForm, check_full, shards_of, tensors_of, write_index, write_shards
from qsvd.export.peft import peft_adapter, write_adapter_files
from qsvd.export.trained import (
    ExportFolder,
    Inventory,
    Trained,
    TrainedModel,
    disk_bytes,
    size_of,
    take_inventory,
    whole_error,
)
from qsvd.files.adapter import FINGERPRINT
from qsvd.files.atomic import read_object, write_json
from qsvd.files.layout import ADAPTER_TENSORS
from qsvd.files.quantized.compressed import (
    CODES,
    METHOD,
    compressed_config,
    compressed_tensors,
    ignored_layers,
    renamed,
    stored_compressed,
)
from qsvd.files.safetensors import NewTensor, new_tensor, new_tensors, read_header, read_tensor, write_stream
from qsvd.files.source import copy_files, open_checkpoint, read_config
from qsvd.files.workspace import MANIFEST
from qsvd.numerics.int4 import GROUPS, Int4
from qsvd.numerics.norms import frobenius
from qsvd.plan.rules import HEADS, is_linear
from qsvd.plan.weights import WeightSpec, build, describe
from qsvd.records import stored


@dataclass(frozen=True)
class CompressedWeight:
    """One weight as it is written, and its error."""

    name: str  # of the tensor in the quantized model
    error: float  # ||written - W'||_F
    norm: float  # ||W'||_F; 0 where the error is 0 by construction

    @property
    def relative_error(self) -> float:
        return self.error / self.norm if self.norm else 0.0


@dataclass(frozen=True)
class CompressedExport:
    """The result of `write_compressed`."""

    weights: tuple[CompressedWeight, ...]  # that have 4 bits
    left: tuple[str, ...]  # layers that stay in 16 bits, since no group divides their inputs
    group: int  # inputs that share a scale
    rank: int  # of the adapter next to the weights; 0 if there is none
    num_bytes: int  # of all tensors

    @property
    def relative_error(self) -> float:
        """Return ||written - W'||_F / ||W'||_F of all weights together."""
        return whole_error((weight.error, weight.norm) for weight in self.weights)

    @property
    def worst(self) -> CompressedWeight:
        """Return the weight with the largest relative error."""
        return max(self.weights, key=lambda weight: weight.relative_error)

    @property
    def lines(self) -> list[str]:
        """Return the size and the error in words."""
        lines = [f"{len(self.weights)} weights of 4 bits, groups of {self.group} inputs, {self.num_bytes / 1e6:.1f} MB"]
        if self.rank:
            what = f"the residual is not rounded again; next to it is an adapter of rank {self.rank}"
        else:
            what = "the merged weights were rounded to 4 bits again"
        lines.append(f"{what}: relative error {self.relative_error:.4f} against the merged weights")
        if self.worst.error:
            lines.append(f"worst layer: {self.worst.name}, relative error {self.worst.relative_error:.4f}")
        if self.left:
            lines.append(
                f"{len(self.left)} layers stay in 16 bits, since no group divides their inputs: {listing(self.left)}"
            )
        return lines


@dataclass(frozen=True)
class CompressedForm:
    """The form of a compressed-tensors checkpoint.

    Args:
        task: PEFT's task_type; only a language model, "CAUSAL_LM", keeps its residual.
        dtype: Of the adapter, None for float32; or of what is not quantized, None for the dtype of the 16-bit model.
        shard_bytes: Maximum size of a file.
        config_changes: Entries of config.json to replace or add, such as the architectures of a classifier.
    """

    task: str | None
    dtype: torch.dtype | None = None
    shard_bytes: int = 5 * 10**9
    config_changes: Mapping[str, Any] = field(default_factory=dict)


def write_compressed(model: TrainedModel, folder: Path, form: CompressedForm) -> CompressedExport:
    """Write a checkpoint that needs neither qsvd nor bitsandbytes.

    Args:
        model: Read twice, one weight at a time.
        folder: Does not exist, is empty, or was left by the same export.

    Raises:
        BadInput: the trained values are not usable; a weight is an expert or no plain nn.Linear; no group divides the
            inputs of any layer; the folder holds something else.
        DoesNotFit: the files do not fit on the disk.
    """
    changed = list[str]()  # what a LoRA on the residual does not say

    def look(name: str, trained: Trained) -> None:
        if trained.gain_O is not None or trained.delta_OI is not None:
            changed.append(name)

    inventory = take_inventory(model, look)
    keeps = model.split.manifest["header"].get("quantizer") == METHOD and form.task == "CAUSAL_LM"
    if keeps and not changed and not model.full:
        return _with_adapter(model, folder, form, inventory)
    return _rounded_again(model, folder, form, inventory)


# The residual as it is, and an adapter.


def _with_adapter(model: TrainedModel, folder: Path, form: CompressedForm, inventory: Inventory) -> CompressedExport:
    """Write the shards of the residual to the byte, and the trained factors as a LoRA next to them."""
    dtype = form.dtype or torch.float32
    new, config, adapter = peft_adapter(model, inventory, base=None, task=form.task, dtype=dtype)
    shards = _residual_shards(model)
    copied, settings = _small_files(model), read_object(model.split.folder / "config.json")
    identity = _identity(model, form, inventory) | {"adapter": config, "dtype": str(dtype)}
    most_bytes = sum(disk_bytes(tensors) for tensors in (*shards.values(), new)) + _size_on_disk(copied)
    with ExportFolder(folder, identity, most_bytes) as export:
        if not export.is_complete:
            weights = tuple(_adapter_error(model, name, dtype) for name in model.split.weights)
            write_shards(folder, shards)
            write_index(folder, shards)  # of one shard too: vLLM reads every file of a folder without an index
            copy_files(copied, folder)
            write_json(folder / "config.json", settings | dict(form.config_changes))
            write_adapter_files(folder, new, config, {FINGERPRINT: model.split.fingerprint})
            group = settings["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"]
            num_bytes = sum(size_of(tensors) for tensors in (*shards.values(), new))
            export.finish(asdict(CompressedExport(weights, (), group, adapter.rank, num_bytes)))
        return export.result(CompressedExport)


def _residual_shards(model: TrainedModel) -> dict[str, list[NewTensor]]:
    """Return the tensors of each file of the residual, under the names that they have there."""
    files = sorted({entry.file for entry in model.split.tensors.values() if entry.file.name != ADAPTER_TENSORS})
    return {file.name: new_tensors(read_header(file).tensors) for file in files}


def _adapter_error(model: TrainedModel, name: str, dtype: torch.dtype) -> CompressedWeight:
    """Return the error of rounding the factors of one weight to `dtype`."""
    if dtype == torch.float32:
        return CompressedWeight(name, 0.0, 0.0)
    trained = model.read(name)
    dense_OI, up_OK, down_KI = model.dense(name, trained), trained.up_OK.to(dtype), trained.down_KI.to(dtype)
    written_OI = model.split.residual(name).decode().addmm_(up_OK.float(), down_KI.float())
    return CompressedWeight(name, frobenius(written_OI - dense_OI), frobenius(dense_OI))


# The merged weights, rounded.


def _rounded_again(model: TrainedModel, folder: Path, form: CompressedForm, inventory: Inventory) -> CompressedExport:
    """Write each merged weight in int4, from a file of its own in the folder of unfinished work."""
    kept_dtype = model.split.stored_dtype
    merged = MergedForm(form.dtype or kept_dtype, form.shard_bytes, form.config_changes)
    check_full(model, merged)
    codec, left = _codec(model)
    modules, group = model.modules(), codec.block_size
    quantized = {name: path for name, path in modules.items() if path not in left}
    settings = _settings(model, form, quantized, codec)
    copied = _small_files(model)
    identity = _identity(model, form, inventory) | {"group": group, "dtype": str(merged.dtype)}
    plain = tensors_of(model, kept_dtype, form.dtype or kept_dtype)
    with ExportFolder(folder, identity, _most_bytes(plain, quantized, group) + _size_on_disk(copied)) as export:
        if not export.is_complete:
            paths = {name: export.unfinished / f"{number:05d}.codes" for number, name in enumerate(quantized)}
            weights = tuple(_rounded(model, name, path, codec) for name, path in paths.items())
            shards = shards_of(_in_codes(plain, paths), form.shard_bytes)
            write_shards(folder, shards)
            copy_files(copied, folder)
            write_json(folder / "config.json", settings | {"dtype": str(merged.dtype).removeprefix("torch.")})
            num_bytes = sum(size_of(tensors) for tensors in shards.values())
            export.finish(asdict(CompressedExport(weights, left, group, 0, num_bytes)))
        return export.result(CompressedExport)


def _codec(model: TrainedModel) -> tuple[Int4, tuple[str, ...]]:
    """Return the codec with the largest group that divides the inputs of all layers, and layers that no group divides.

    Raises:
        BadInput: a weight is an expert or no plain nn.Linear, or no group divides the inputs of any layer.
    """
    composed = [weight["module"] for weight in model.split.weights.values() if "sources" in weight]
    if composed:
        raise BadInput(
            f"{len(composed)} weights are experts, or layers that are not a plain nn.Linear, which compressed-tensors "
            f"does not replace: {listing(composed)}; use --to merged"
        )
    modules = model.modules()
    widths = {modules[name]: weight["shape"][1] for name, weight in model.split.weights.items()}
    left = tuple(path for path, width in widths.items() if width % min(GROUPS))
    if len(left) == len(widths):
        raise BadInput(
            f"no layer has inputs that divide by {min(GROUPS)}, the smallest group of compressed-tensors: "
            f"{listing(left)}; use --to merged"
        )
    whole = [width for path, width in widths.items() if path not in left]
    group = next(group for group in sorted(GROUPS, reverse=True) if all(width % group == 0 for width in whole))
    return Int4(group), left


def _rounded(model: TrainedModel, name: str, path: Path, codec: Int4) -> CompressedWeight:
    """Write the codes of one weight to its own file, unless an earlier run did, and return its error.

    Raises:
        BadInput: the merged weight has a NaN or an infinity.
    """
    if not path.is_file():
        dense_OI = model.dense(name)
        norm = frobenius(dense_OI)
        if not isfinite(norm):
            raise BadInput(f"{name}, merged, has a NaN or an infinity; repair the run, or use an earlier checkpoint")
        packed = round_nearest(dense_OI, codec)
        error = frobenius(packed.decode().sub_(dense_OI))
        record = json.dumps(asdict(CompressedWeight(name, error, norm)))
        write_stream(path, new_tensors(compressed_tensors(name, packed)), {"record": record})
    return stored(CompressedWeight, json.loads(read_header(path).metadata["record"]), f"{path} is damaged")


def _in_codes(plain: Iterable[NewTensor], paths: Mapping[str, Path]) -> list[NewTensor]:
    """Return the tensors of the merged model, with codes and scales in the place of the weights that have them."""
    new = []
    for tensor in plain:
        if tensor.name in paths:
            new += [new_tensor(*named) for named in read_header(paths[tensor.name]).tensors.items()]
        else:
            new.append(tensor)
    return new


def _settings(model: TrainedModel, form: CompressedForm, quantized: Mapping[str, str], codec: Int4) -> dict[str, Any]:
    """Return config.json. Its quantization_config names every linear layer that is not in `quantized`."""
    folder = model.split.folder
    settings = read_object(folder / "config.json") | dict(form.config_changes)
    config = read_config(folder)
    config.architectures = settings["architectures"]
    built = build(config)
    specs = [
        WeightSpec(name, path, tuple(model.split.weights[name]["shape"]), model.split.weights[name]["role"], 0)
        for name, path in quantized.items()
    ]
    linears = [path for path, module in built.named_modules() if is_linear(module)]
    left = tuple(path for path in linears if path not in {*quantized.values()})
    ignored = ignored_layers(replace(describe(built), weights=tuple(specs), left_linears=left), HEADS)
    settings.pop("torch_dtype", None)  # the older name of dtype
    return settings | {"quantization_config": compressed_config(codec, ignored)}


def _most_bytes(plain: Sequence[NewTensor], quantized: Mapping[str, str], group: int) -> int:
    """Return the most bytes on the disk: codes are there twice, in files of their own and in the shards."""
    others = [tensor for tensor in plain if tensor.name not in quantized]
    elements = sum(tensor.shape[0] * tensor.shape[1] for tensor in plain if tensor.name in quantized)
    return disk_bytes(others) + 2 * (elements // 2 + 2 * elements // group) + disk_bytes([]) * len(quantized) // 500


# Both forms.


def _identity(model: TrainedModel, form: CompressedForm, inventory: Inventory) -> dict[str, Any]:
    return {
        "to": METHOD,
        "base": model.split.fingerprint,
        "trained": inventory.digest,
        "task": form.task,
        "shard_bytes": form.shard_bytes,
        "config_changes": dict(form.config_changes),
    }


def _small_files(model: TrainedModel) -> list[Path]:
    """Return tokenizer, templates and licence of the quantized model."""
    return [file for file in open_checkpoint(str(model.split.folder)).other_files if file.name != MANIFEST]


def _size_on_disk(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def written_weight(folder: Path, name: str, shape: tuple[int, int], group: int) -> Tensor | None:
    """Read one weight of an export as it was written, float32 [O, I]; None if it has no codes there."""
    for file in sorted(folder.glob("model*.safetensors")):
        tensors = read_header(file).tensors
        if name + CODES in tensors:
            return stored_compressed(name, renamed(tensors, [name]), shape, Int4(group)).read(read_tensor).decode()
    return None
