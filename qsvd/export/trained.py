"""What training left, in the form that every export starts from, and what must hold before one is begun.

A trained weight is W' = gain * (Q + B A). Q is in the base folder; B, A and the gain come by name, weight by weight.
Shape suffixes: O = out features, I = in features, K = rank of one weight's trained factors.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qsvd.errors import BadInput, listing
from qsvd.files.layout import ADAPTER_PREFIX, digest, fingerprint
from qsvd.files.safetensors import TensorEntry
from qsvd.files.split_folder import SplitFolder

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Trained:
    """One trained weight, W' = gain_O[:, None] * (Q + up_OK @ down_KI).

    Args:
        up_OK, down_KI: float32, every scale folded in; K may be 0, and differ from weight to weight.
        gain_O: float32, a factor for each row; None is 1.
    """

    up_OK: Tensor
    down_KI: Tensor
    gain_O: Tensor | None = None


@dataclass(frozen=True)
class TrainedModel:
    """A base folder and what was trained beside it.

    Args:
        split: The base.
        weight: The trained factors of a split weight, by the name of its tensor in the base; KeyError if it has none.
        full: Parameters that were trained as they are, such as a new head, by their names in the trained model.
        spelling: Name in the trained model -> name of the tensor in the base, as `check.resolve` finds it; what is not
            in it is spelled as in the base.
    """

    split: SplitFolder
    weight: Callable[[str], Trained]
    full: Mapping[str, Tensor] = field(default_factory=dict)
    spelling: Mapping[str, str] = field(default_factory=dict)

    def read(self, name: str) -> Trained:
        """The trained weight, on the CPU and apart from any graph."""
        trained = self.weight(name)
        gain_O = None if trained.gain_O is None else trained.gain_O.detach().cpu()
        return Trained(trained.up_OK.detach().cpu(), trained.down_KI.detach().cpu(), gain_O)

    def dense(self, name: str) -> Tensor:
        """W', float32 [O, I]."""
        trained = self.read(name)
        dense_OI = self.split.residual(name).decode().addmm_(trained.up_OK, trained.down_KI)
        return dense_OI if trained.gain_O is None else dense_OI.mul_(trained.gain_O[:, None])

    def modules(self) -> dict[str, str]:
        """Name of a split weight's tensor -> path of its module in the trained model."""
        spelled = {name: model_name for model_name, name in self.spelling.items()}
        return {
            name: spelled.get(name, f"{weight['module']}.weight").removesuffix(".weight")
            for name, weight in self.split.weights.items()
        }

    def others(self) -> dict[str, TensorEntry]:
        """Every tensor of the base that is no part of a split weight, by its name there."""
        residuals = self.split.residual_names
        return {
            name: entry
            for name, entry in self.split.tensors.items()
            if not name.startswith(ADAPTER_PREFIX) and name not in residuals
        }


@dataclass(frozen=True)
class Inventory:
    """What a trained model consists of.

    Args:
        ranks: K of every split weight, by the name of its tensor.
        has_gains: Whether rows are scaled; then those of every weight are that has factors.
        digest: SHA-256, in hex, over all trained values: what a resumed export must find again.
    """

    ranks: dict[str, int]
    has_gains: bool
    digest: str


def take_inventory(model: TrainedModel) -> Inventory:
    """Read everything that was trained once, one weight at a time, and refuse what cannot be exported.

    Raises:
        BadInput: weights are missing, have another dtype or shape than the base asks for, or a NaN or infinity; some
            weights have gains and some none; a parameter trained in full is a split weight or no finite float tensor.
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
        values = {"up": trained.up_OK, "down": trained.down_KI}
        if trained.gain_O is not None:
            values["gain"] = trained.gain_O
            gained.append(name)
        faults = _faults(values, weight["shape"])
        wrong += [f"{name}: {fault}" for fault in faults]
        if not faults:
            ranks[name], digests[name] = trained.down_KI.shape[0], digest(values)
    wrong += [f"{name}: {fault}" for name, tensor in model.full.items() for fault in _full_faults(model, name, tensor)]
    digests |= {f"full {name}": digest({name: tensor.detach().cpu()}) for name, tensor in model.full.items()}
    _refuse(model, missing, wrong)
    without = [name for name, rank in ranks.items() if rank and name not in gained]
    if gained and without:
        raise BadInput(
            f"{len(without)} of {len(ranks)} weights have no gain ({listing(without)}); give all one or none"
        )
    return Inventory(ranks, bool(gained), fingerprint(digests))


def _refuse(model: TrainedModel, missing: list[str], wrong: list[str]) -> None:
    problems = []
    if missing:
        problems.append(f"{len(missing)} of {len(model.split.weights)} split weights are missing: {listing(missing)}")
    if wrong:
        problems.append(f"{len(wrong)} tensors are not as they must be: {listing(wrong)}")
    if problems:
        raise BadInput(f"what was trained does not fit {model.split.folder}: {'; '.join(problems)}")


def _faults(values: Mapping[str, Tensor], shape: tuple[int, int]) -> list[str]:
    rows, columns = shape
    rank = values["down"].shape[0] if values["down"].ndim else 0
    wanted = {"up": (rows, rank), "down": (rank, columns), "gain": (rows,)}
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
    """Refuse a dtype that no export is written in.

    Raises:
        BadInput: it is none of float32, bfloat16, float16.
    """
    if dtype not in DTYPES:
        raise BadInput(f"dtype {str(dtype).removeprefix('torch.')} is none of float32, bfloat16, float16")


def rounded(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The values in `dtype`, rounded once.

    Raises:
        BadInput: a value is beyond the range of the dtype, or was no finite number before; it names the tensor.
    """
    values = values.to(dtype)
    if not values.isfinite().all():
        raise BadInput(
            f"{name} has values beyond the range of {str(dtype).removeprefix('torch.')}; export in bfloat16 or float32"
        )
    return values
