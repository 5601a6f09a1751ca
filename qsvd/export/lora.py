"""Export a trained adapter as a PEFT LoRA for the 16-bit model.

With the trained W' = Q + B A and the stored components B0 A0, the LoRA is dW = B A - B0 A0. It leaves the quantization
error W + dW - W' = W - Q - B0 A0, which is measured, or read from errors.jsonl.

Shape suffixes: O = out features, I = in features, K, R, S = ranks of trained, stored and written factors; M = K + R.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from qsvd.errors import BadInput, listing
from qsvd.export.peft import adapter_settings, check_place, kept_modules, write_adapter_files
from qsvd.export.pruned import Place, PrunedRecord
from qsvd.export.trained import (
    ExportFolder,
    Inventory,
    Trained,
    TrainedModel,
    check_dtype,
    disk_bytes,
    rounded,
    size_of,
    take_inventory,
    whole_error,
)
from qsvd.files.layout import ADAPTER_PREFIX
from qsvd.files.quantized.manifest import read_errors
from qsvd.files.safetensors import DTYPE_NAMES, NewTensor, new_tensors, read_header, read_tensor, write_stream
from qsvd.files.source import Checkpoint
from qsvd.files.split_folder import SplitFolder
from qsvd.files.workspace import ERRORS
from qsvd.numerics.norms import frobenius
from qsvd.records import stored

SOURCE_FINGERPRINT = "qsvd_source_fingerprint"
ROUNDOFF = torch.finfo(torch.float32).eps  # rounding both factors to float32 moves a product by eps |B| |A| at most


@dataclass(frozen=True)
class LoraWeight:
    """The LoRA of one weight and its error."""

    name: str  # of the tensor
    rank: int  # of dW; 0 if training changed nothing
    error: float  # ||W + dW - W'||_F
    norm: float  # ||W||_F

    @property
    def relative_error(self) -> float:
        return self.error / self.norm if self.norm else 0.0


def difference(trained: Trained, stored: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Return balanced factors of dW, float64 [O, S] and [S, I]; S is its numerical rank.

    Singular values that the rounding of the factors to float32 could have made (Weyl's inequality) count as zero.

    Args:
        trained: B [O, K] and A [K, I].
        stored: B0 [O, R] and A0 [R, I] of any float dtype; None is R = 0.
    """
    left_OM, right_MI = trained.up_OK.double(), trained.down_KI.double()
    size = left_OM.norm() * right_MI.norm()
    if stored is not None:
        up_OR, down_RI = (factor.double() for factor in stored)
        size += up_OR.norm() * down_RI.norm()
        left_OM, right_MI = torch.cat((left_OM, -up_OR), dim=1), torch.cat((right_MI, down_RI))
    left_OM, left_core = torch.linalg.qr(left_OM)
    right_IM, right_core = torch.linalg.qr(right_MI.mT)
    left, values, right = torch.linalg.svd(left_core @ right_core.mT, full_matrices=False)
    rank = int((values > ROUNDOFF * size).sum())
    roots_S = values[:rank].sqrt()
    return left_OM @ (left[:, :rank] * roots_S), (right_IM @ (right[:rank].mT * roots_S)).mT


def measured(dense_OI: Tensor, weight_OI: Tensor, up_OS: Tensor, down_SI: Tensor) -> tuple[float, float]:
    """Return ||W + dW - W'||_F and ||W||_F.

    Args:
        dense_OI: W', float32.
        weight_OI: W, of any float dtype.
        up_OS, down_SI: The rounded factors of dW.
    """
    error_OI = dense_OI.neg().add_(weight_OI).addmm_(up_OS.float(), down_SI.float())
    return frobenius(error_OI), frobenius(weight_OI.float())


def recorded(split: SplitFolder) -> dict[str, tuple[float, float]]:
    """Return ||W - Q - B0 A0||_F and ||W||_F of every split weight, as `qsvd quantize` measured them.

    Raises:
        BadInput: errors.jsonl does not exist, is damaged or lacks a weight.
    """
    path = split.folder / ERRORS
    advice = "give the 16-bit model, to measure the error"
    errors = read_errors(path, split.manifest, advice)
    found = {error.name: (error.after.frobenius, error.weight_frobenius) for error in errors}
    missing = [weight["module"] for weight in split.weights.values() if weight["module"] not in found]
    if missing:
        raise BadInput(f"{path} lacks {len(missing)} weights ({listing(missing)}); {advice}")
    return {name: found[weight["module"]] for name, weight in split.weights.items()}


@dataclass(frozen=True)
class LoraExport:
    """The result of `write_lora`."""

    weights: tuple[LoraWeight, ...]  # in the order of the manifest
    rank: int  # of all factors; lower ranks are padded with zeros
    is_measured: bool  # else errors are those of `qsvd quantize`, without the rounding of the new factors
    kept_modules: tuple[str, ...]  # saved whole, PEFT's modules_to_save
    num_bytes: int  # of all tensors

    @property
    def relative_error(self) -> float:
        """Return ||W + dW - W'||_F / ||W||_F of all weights together."""
        return whole_error((weight.error, weight.norm) for weight in self.weights)

    @property
    def line(self) -> str:
        """Return the error in words."""
        how = "measured" if self.is_measured else "as qsvd quantize recorded it"
        return f"the original with this LoRA is not the trained model: relative error {self.relative_error:.4f}, {how}"


@dataclass(frozen=True)
class Target:
    """The model that a LoRA is written for.

    Args:
        base: Path or hub id of the 16-bit model.
        task: PEFT's task_type, "CAUSAL_LM"; None for a bare encoder.
        original: The same model, to measure the error; None takes the errors that `qsvd quantize` recorded.
        dtype: Dtype of the factors: float32, bfloat16 or float16.
        pruned: What was removed from that model before it was quantized, of which `original` is None; the LoRA is zero
            there. None: nothing.
    """

    base: str
    task: str | None
    original: Checkpoint | None = None
    dtype: torch.dtype = torch.float32
    pruned: PrunedRecord | None = None

    def place(self, weight: Mapping[str, Any]) -> Place:
        """Return where a weight of the quantized model, from its manifest, is in the 16-bit model."""
        shape = tuple(weight["shape"])
        return Place(shape) if self.pruned is None else self.pruned.place(weight["module"], shape)


def write_lora(model: TrainedModel, folder: Path, target: Target) -> LoraExport:
    """Write a PEFT LoRA for the 16-bit model, with one weight at a time in memory.

    All factors are padded with zeros to the same rank: llama.cpp divides alpha by the rank of each factor, vLLM by the
    one in the config, and neither reads PEFT's rank_pattern. Layers whose factors are those that are stored are left
    out, and with quantized experts all that training did not change.

    Args:
        model: Without gains.
        folder: Does not exist, is empty, or was left by the same export.

    Raises:
        BadInput: the trained values are not usable or have gains; `original` is another model; no errors are recorded;
            experts were trained, or PEFT would put a LoRA elsewhere; PEFT cannot save the parameters trained in full;
            the folder holds something else.
        DoesNotFit: the files do not fit on the disk.
    """
    check_dtype(target.dtype)
    known = _known_errors(model, target.original)
    same: set[str] = set()  # what training did not change
    differs = _is_changed if _experts(model) else _differs

    def compare(name: str, trained: Trained) -> None:
        if not differs(trained, model.split.factors(name)):
            same.add(name)

    inventory = take_inventory(model, compare)
    if inventory.has_gains:
        raise BadInput("the trained model scales the rows of its weights, which a LoRA on the 16-bit model cannot do")
    written = _written(model, same)
    kept, whole = kept_modules(model, target.task)
    most_bytes = _most_bytes(model, inventory, target) + disk_bytes(whole)
    with ExportFolder(folder, _identity(model, target, inventory), most_bytes) as export:
        if not export.is_complete:
            paths = {
                name: export.unfinished / f"{number:05d}.factors" for number, name in enumerate(model.split.weights)
            }
            weights = tuple(
                LoraWeight(name, 0, *known[name])
                if name in same and name in known and name not in written
                else _reduced(model, name, paths[name], target, known.get(name))
                for name in paths
            )
            _check_errors(weights)
            rank = max(1, *(weight.rank for weight in weights))
            new = [*_factors(written, model, paths, rank, target), *whole]
            config = adapter_settings(dict.fromkeys(written.values(), rank), kept, target.task, target.base)
            source = _source(model) if target.pruned is None else vars(target.pruned)
            write_adapter_files(export.folder, new, config, {SOURCE_FINGERPRINT: source["fingerprint"]})
            export.finish(asdict(LoraExport(weights, rank, target.original is not None, kept, size_of(new))))
        return export.result(LoraExport)


def _check_errors(weights: Sequence[LoraWeight]) -> None:
    wrong = [weight.name for weight in weights if not isfinite(weight.error + weight.norm)]
    if wrong:
        raise BadInput(
            f"{len(wrong)} weights of the 16-bit model have values that are NaN or infinite: {listing(wrong)}; repair "
            "the checkpoint"
        )


def _source(model: TrainedModel) -> dict[str, Any]:
    return model.split.manifest["source"]


def _known_errors(model: TrainedModel, original: Checkpoint | None) -> dict[str, tuple[float, float]]:
    """Return error and norm of every weight if no 16-bit model is given to measure them; check the model if it is."""
    if original is None:
        return recorded(model.split)
    if original.fingerprint != _source(model)["fingerprint"]:
        raise BadInput(
            f"{original.name} is not the model that {model.split.folder} was made from, {_source(model)['model']}: its "
            "fingerprint differs; give that model, unchanged"
        )
    return {}


def _identity(model: TrainedModel, target: Target, inventory: Inventory) -> dict[str, Any]:
    recovers = {} if target.pruned is None else {"source_fingerprint": target.pruned.fingerprint}
    return recovers | {
        "to": "lora",
        "residual": model.split.fingerprint,
        "trained": inventory.digest,
        "base": target.base,
        "task": target.task,
        "dtype": str(target.dtype),
        "is_measured": target.original is not None,
    }


def _most_bytes(model: TrainedModel, inventory: Inventory, target: Target) -> int:
    """Return the most bytes of the factors, which are on the disk twice: in files of their own, and padded in one."""
    shapes = {name: target.place(weight).shape for name, weight in model.split.weights.items()}
    ranks = (min(rank + model.split.weights[name]["rank"], *shapes[name]) for name, rank in inventory.ranks.items())
    return 2 * max(1, *ranks) * sum(sum(shape) for shape in shapes.values()) * target.dtype.itemsize


def _reduced(
    model: TrainedModel, name: str, path: Path, target: Target, known: tuple[float, float] | None
) -> LoraWeight:
    """Write the difference of one weight to its own file, unless an earlier run did."""
    if not path.is_file():
        trained = model.read(name)
        factors = difference(trained, model.split.factors(name))
        up_OS, down_SI = (rounded(factor, target.dtype, f"the LoRA of {name}") for factor in factors)
        if known is None:
            assert target.original is not None, "an original, or recorded errors"
            weight_OI = model.original_weight(target.original, name)
            known = measured(model.dense(name, trained), weight_OI, up_OS, down_SI)
        record = json.dumps(asdict(LoraWeight(name, len(down_SI), *known)))
        write_stream(path, new_tensors({"B": up_OS, "A": down_SI}), {"record": record})
    return stored(LoraWeight, json.loads(read_header(path).metadata["record"]), f"{path} is damaged")


def _experts(model: TrainedModel) -> set[str]:
    return {name for name, weight in model.split.weights.items() if "stack" in weight}


def _written(model: TrainedModel, same: Collection[str]) -> dict[str, str]:
    """Return the weights that the LoRA has, and their modules: those that changed, or the first one.

    Args:
        same: The weights that did not change.

    Raises:
        BadInput: an expert changed, or PEFT would not put the LoRA on these modules of the 16-bit model.
    """
    modules, experts = model.modules(), _experts(model)
    changed = [name for name in modules if name not in same]
    trained = [modules[name] for name in changed if "stack" in model.split.weights[name]]
    if trained:
        raise trained_experts(trained)
    others = [name for name in modules if name not in experts]
    written = {name: modules[name] for name in changed or others[:1]}  # PEFT needs one
    if experts:
        check_place(model, [*written.values()])
    return written


def trained_experts(paths: Sequence[str]) -> BadInput:
    """Return the refusal of a LoRA for experts."""
    return BadInput(
        f"{len(paths)} experts were trained ({listing(paths)}), and PEFT has no LoRA for one expert of a stack; use "
        "--to merged"
    )


def _differs(trained: Trained, stored: tuple[Tensor, Tensor] | None) -> bool:
    """Return whether the factors of a weight are not the stored ones."""
    if stored is None:
        return len(trained.down_KI) > 0
    pairs = zip((trained.up_OK, trained.down_KI), stored, strict=True)
    return not all(torch.equal(one, other.float()) for one, other in pairs)


def _is_changed(trained: Trained, stored: tuple[Tensor, Tensor] | None) -> bool:
    """Return whether training changed the product of the factors of a weight."""
    return _differs(trained, stored) and len(trained.down_KI) > 0 and len(difference(trained, stored)[1]) > 0


def _factors(
    written: Mapping[str, str], model: TrainedModel, paths: Mapping[str, Path], rank: int, target: Target
) -> list[NewTensor]:
    """Return B and A of these weights; they are read and padded when they are written."""
    new = []
    for name, module in written.items():
        place = target.place(model.split.weights[name])
        rows, columns = place.shape
        for letter, spread, shape in (("A", place.down, (rank, columns)), ("B", place.up, (rows, rank))):
            key, made = f"{ADAPTER_PREFIX}{module}.lora_{letter}.weight", partial(_padded, paths[name], letter, shape)
            new.append(NewTensor(key, DTYPE_NAMES[target.dtype], shape, partial(made, spread)))
    return new


def _padded(path: Path, letter: str, shape: tuple[int, int], spread: Callable[[Tensor], Tensor]) -> Tensor:
    factor = spread(read_tensor(read_header(path).tensors[letter]))
    return pad(factor, (0, shape[1] - factor.shape[1], 0, shape[0] - factor.shape[0]))
