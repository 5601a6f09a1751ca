"""A trained model in the form that every export starts from, the checks before an export, and its folder.

A trained weight is W' = gain * (Q + B A). Q is in the quantized model; B, A and the gain are read weight by weight.
Shape suffixes: O = out features, I = in features, K = rank of one weight's trained factors.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from qsvd.errors import BadInput, listing
from qsvd.files.atomic import read_record, write_record
from qsvd.files.layout import ADAPTER_PREFIX, digest, fingerprint
from qsvd.files.readers import check_contents, check_tensors, content_digest
from qsvd.files.safetensors import TORCH_DTYPES, NewTensor, TensorEntry
from qsvd.files.source import Checkpoint
from qsvd.files.split_folder import SplitFolder
from qsvd.files.workspace import ANOTHER_FOLDER, IDENTITY, LOCK, UNFINISHED, Workspace
from qsvd.plan.weights import Source
from qsvd.records import stored

Result = TypeVar("Result")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def whole_error(parts: Iterable[tuple[float, float]]) -> float:
    """Return the relative error of all weights together from the error and the norm of each, Frobenius."""
    known = list(parts)
    norm = math.hypot(*(norm for _, norm in known))
    return math.hypot(*(error for error, _ in known)) / norm if norm else 0.0


@dataclass(frozen=True)
class Trained:
    """One trained weight, W' = gain_O[:, None] * (Q + up_OK @ down_KI) + delta_OI.

    Args:
        up_OK, down_KI: float32, with every scale included; K may be 0 and differ between weights.
        gain_O: float32, a factor for each row; None is 1.
        delta_OI: float32; None is 0.
    """

    up_OK: Tensor
    down_KI: Tensor
    gain_O: Tensor | None = None
    delta_OI: Tensor | None = None


@dataclass(frozen=True)
class TrainedModel:
    """A quantized model and its trained adapter.

    Args:
        split: The quantized model.
        weight: Returns the trained values of a weight, by its tensor name in the quantized model; KeyError if it has
            none.
        full: Parameters that were trained themselves, such as a new head, by their names in the trained model.
        spelling: Name in the trained model -> tensor name in the quantized model, from `check.resolve`; a name that it
            lacks is the same in both.
    """

    split: SplitFolder
    weight: Callable[[str], Trained]
    full: Mapping[str, Tensor] = field(default_factory=dict)
    spelling: Mapping[str, str] = field(default_factory=dict)

    def read(self, name: str) -> Trained:
        """Return the trained values of a weight, on the CPU and detached from the autograd graph."""
        trained = self.weight(name)
        gain_O, delta_OI = (
            None if part is None else part.detach().cpu() for part in (trained.gain_O, trained.delta_OI)
        )
        return Trained(trained.up_OK.detach().cpu(), trained.down_KI.detach().cpu(), gain_O, delta_OI)

    def dense(self, name: str, trained: Trained | None = None) -> Tensor:
        """Return W', float32 [O, I]; `trained` are its values, if they were read."""
        trained = trained or self.read(name)
        dense_OI = self.split.residual(name).decode().addmm_(trained.up_OK, trained.down_KI)
        if trained.gain_O is not None:
            dense_OI.mul_(trained.gain_O[:, None])
        return dense_OI if trained.delta_OI is None else dense_OI.add_(trained.delta_OI)

    def original_weight(self, original: Checkpoint, name: str) -> Tensor:
        """Return W [O, I] of the 16-bit model, in its dtype."""
        sources = self.split.weights[name].get("sources")
        if sources is None:
            return original.read(name)
        known = [{key: value for key, value in source.items() if key != "shape"} for source in sources]
        return torch.cat([original.read_part(Source(**source)) for source in known])

    def on_original(self, original: Checkpoint, name: str) -> Tensor:
        """Return W + (W' - Q - B0 A0), float32 [O, I]: the weight W of the 16-bit model with the trained change."""
        change_OI = self.dense(name) - self.split.dense(name)
        return self.original_weight(original, name).float() + change_OI

    def modules(self) -> dict[str, str]:
        """Return the path of the module in the trained model of every weight, by its tensor name."""
        spelled = {name: model_name for model_name, name in self.spelling.items()}
        return {
            name: spelled.get(name, f"{weight['module']}.weight").removesuffix(".weight")
            for name, weight in self.split.weights.items()
        }

    def others(self) -> dict[str, TensorEntry]:
        """Return every tensor of the quantized model that is not part of a split weight, by its name."""
        residuals = self.split.residual_names
        return {
            name: entry
            for name, entry in self.split.tensors.items()
            if not name.startswith(ADAPTER_PREFIX) and name not in residuals
        }


@dataclass(frozen=True)
class Inventory:
    """The ranks and the digest of a trained model.

    Args:
        ranks: K of every split weight, by its tensor name.
        has_gains: Whether rows are scaled, in every weight with K > 0 or in none.
        digest: SHA-256 of all trained values, part of the identity of an export.
    """

    ranks: dict[str, int]
    has_gains: bool
    digest: str


def take_inventory(model: TrainedModel, see: Callable[[str, Trained], None] | None = None) -> Inventory:
    """Read all trained values, one weight at a time, and refuse those that cannot be exported.

    Args:
        see: Gets the name and the values of every weight that can be exported, so that they are not read again.

    Raises:
        BadInput: weights are missing, have a wrong dtype or shape, or a NaN or infinity; only some weights have gains;
            a parameter trained in full is a split weight or not a finite float tensor.
    """
    ranks: dict[str, int] = {}
    digests: dict[str, str] = {}
    missing, wrong, gained = [], [], []
    for name, weight in model.split.weights.items():
        try:
            trained = model.read(name)
        except KeyError:
            missing.append(name)
            continue
        parts = {"up": trained.up_OK, "down": trained.down_KI, "gain": trained.gain_O, "delta": trained.delta_OI}
        values = {part: tensor for part, tensor in parts.items() if tensor is not None}
        gained += [name] * (trained.gain_O is not None)
        faults = _faults(values, weight["shape"])
        wrong += [f"{name}: {fault}" for fault in faults]
        if not faults:
            ranks[name], digests[name] = trained.down_KI.shape[0], digest(values)
            if see is not None:
                see(name, trained)
    wrong += [f"{name}: {fault}" for name, tensor in model.full.items() for fault in _full_faults(model, name, tensor)]
    digests |= {f"full {name}": digest({name: tensor.detach().cpu()}) for name, tensor in model.full.items()}
    if missing:
        wrong.insert(0, f"{len(missing)} of {len(model.split.weights)} weights are missing ({listing(missing)})")
    if wrong:
        raise BadInput(f"the trained values do not fit {model.split.folder}: {listing(wrong, separator='; ')}")
    without = [name for name, rank in ranks.items() if rank and name not in gained]
    if gained and without:
        raise BadInput(
            f"{len(without)} of {len(ranks)} weights have no gain ({listing(without)}); give one to all or to none"
        )
    return Inventory(ranks, bool(gained), fingerprint(digests))


def _faults(values: Mapping[str, Tensor], shape: tuple[int, int]) -> list[str]:
    rows, columns = shape
    rank = values["down"].shape[0] if values["down"].ndim else 0
    wanted = {"up": (rows, rank), "down": (rank, columns), "gain": (rows,), "delta": (rows, columns)}
    faults = []
    for part, tensor in values.items():
        if tensor.dtype != torch.float32 or tuple(tensor.shape) != wanted[part]:
            dtype = str(tensor.dtype).removeprefix("torch.")
            faults.append(f"{part} is {dtype} {list(tensor.shape)} instead of float32 {list(wanted[part])}")
        elif not tensor.isfinite().all():
            faults.append(f"{part} has a NaN or an infinity")
    return faults


def _full_faults(model: TrainedModel, name: str, tensor: Tensor) -> list[str]:
    if model.spelling.get(name, name) in model.split.weights:
        return ["a split weight cannot be trained in full"]
    if not tensor.is_floating_point():
        return [f"it is {str(tensor.dtype).removeprefix('torch.')}, not a float tensor"]
    return [] if tensor.isfinite().all() else ["it has a NaN or an infinity"]


def check_dtype(dtype: torch.dtype) -> None:
    """Refuse a dtype other than float32, bfloat16 and float16, by BadInput."""
    if dtype not in DTYPES:
        raise BadInput(f"dtype {str(dtype).removeprefix('torch.')} is not float32, bfloat16 or float16")


def rounded(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Round the values to `dtype`.

    Raises:
        BadInput: a value is outside the range of the dtype; the sentence names the tensor.
    """
    values = values.to(dtype)
    if not values.isfinite().all():
        raise BadInput(
            f"{name} has values outside the range of {str(dtype).removeprefix('torch.')}; export in bfloat16 or float32"
        )
    return values


FORMAT = 2
HEADER_BYTES = 300  # of the JSON of one tensor in a header and an index, at most
OTHER_BYTES = 10**6  # of configs and records, at most


class ExportFolder(Workspace):
    """The folder of one run of `qsvd export`; an export that has finished nothing leaves no folder."""

    record = "qsvd_export.json"
    command = "qsvd export"
    sealed_since = FORMAT

    def __init__(self, folder: Path, identity: Mapping[str, Any], num_bytes: int = 0):
        self._is_made = not folder.exists()
        super().__init__(folder, identity, num_bytes)
        if self.is_complete:
            files = read_record(folder / self.record, since=self.sealed_since).get("files", {})
            check_contents(folder, files, self.command, f"remove {folder} and give the command again")

    def __exit__(self, *_: object) -> None:
        if self._lock is not None and self._lock.is_held:
            left = {path.name for path in [*self.folder.iterdir(), *self.unfinished.iterdir()]}
            if left <= {UNFINISHED, IDENTITY, LOCK}:
                self.close()
                if self._is_made:
                    with suppress(OSError):  # another process begins the same export
                        self.folder.rmdir()
        super().__exit__()

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write the record, with the digests of all other files, then remove what only a resumed run needs.

        What ends in .partial, and links, are not of an export.
        """
        there = [path for path in self.folder.rglob("*") if path.is_file() and self.unfinished not in path.parents]
        paths = [path for path in there if path.suffix != ".partial" and not path.is_symlink()]
        files = {str(path.relative_to(self.folder)): content_digest(path) for path in sorted(paths)}
        write_record(
            self.folder / self.record, {"format": FORMAT, "run": self.identity, "result": result, "files": files}
        )
        self.close()

    def result(self, kind: type[Result]) -> Result:
        """Return what was given to `finish`, of a record of this kind."""
        path = self.folder / self.record
        found = read_record(path, since=self.sealed_since).get("result")
        return stored(kind, found, f"{path} is damaged ({ANOTHER_FOLDER})")


@contextmanager
def naming_damage(folder: Path) -> Iterator[None]:
    """Where files of an export do not say what they should, say which of them were damaged since they were written.

    Raises:
        Damaged: a tensor in the folder differs from its digest.
    """
    try:
        yield
    except BadInput:
        for path in sorted(folder.glob("*.safetensors")):
            check_tensors(path)
        raise


def size_of(new: Sequence[NewTensor]) -> int:
    """Return the bytes of all tensors."""
    return sum(math.prod(tensor.shape) * TORCH_DTYPES[tensor.dtype].itemsize for tensor in new)


def disk_bytes(new: Sequence[NewTensor]) -> int:
    """Return an upper bound on the bytes of a file with these tensors and of the small files next to it."""
    return size_of(new) + HEADER_BYTES * len(new) + OTHER_BYTES
