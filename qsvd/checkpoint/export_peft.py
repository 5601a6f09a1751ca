"""A trained adapter as a PEFT folder for the base: a LoRA, or a DoRA where rows are scaled.

Shape suffixes: O = out features, I = in features, K = rank of one weight's factors.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

from qsvd.checkpoint.adapter_folder import FINGERPRINT
from qsvd.checkpoint.export import TrainedModel, check_dtype, rounded, take_inventory
from qsvd.checkpoint.export_folder import ExportFolder, disk_bytes, size_of
from qsvd.checkpoint.layout import ADAPTER_PREFIX
from qsvd.checkpoint.peft_folder import adapter_settings, kept_modules, write_adapter_files
from qsvd.checkpoint.tensor_file import DTYPE_NAMES, NewTensor
from qsvd.plan.listing import listing


@dataclass(frozen=True)
class PeftExport:
    """What `write_peft` wrote.

    Args:
        weights: Number of adapted weights.
        rank: The highest of their ranks.
        least_rank: The lowest.
        use_dora: Whether it is a DoRA.
        kept_modules: Modules saved whole, PEFT's modules_to_save.
        num_bytes: Of all tensors.
    """

    weights: int
    rank: int
    least_rank: int
    use_dora: bool
    kept_modules: tuple[str, ...]
    num_bytes: int


def write_peft(
    model: TrainedModel, folder: Path, *, base: str, task: str | None, dtype: torch.dtype = torch.float32
) -> PeftExport:
    """Write the adapter that plain PEFT puts on the base: W' = Q + B A as LoRA, gain * (Q + B A) as DoRA.

    Args:
        model: What was trained; read twice, one weight at a time.
        folder: Empty or not there, or left by the same export.
        base: Where a loader finds the base folder: its path, or a hub id.
        task: PEFT's task_type, "CAUSAL_LM"; None for a bare encoder.
        dtype: Of the factors: float32, bfloat16 or float16. Magnitudes are float32; what was trained in full stays.

    Raises:
        ValueError: the trained values are not usable; a row that a DoRA must scale is zero; PEFT cannot save what was
            trained in full; the folder holds something else, or does not fit on the disk.
    """
    check_dtype(dtype)
    inventory = take_inventory(model)
    kept, whole = kept_modules(model, task)
    adapted = {name: rank for name, rank in inventory.ranks.items() if rank} or inventory.ranks
    magnitudes = _magnitudes(model, adapted) if inventory.has_gains else ()
    new = [*_factors(model, adapted, dtype), *whole, *magnitudes]
    modules = model.modules()
    ranks = {modules[name]: max(rank, 1) for name, rank in adapted.items()}
    config = adapter_settings(ranks, kept, task, base) | {"use_dora": inventory.has_gains}
    result = PeftExport(len(ranks), max(ranks.values()), min(ranks.values()), inventory.has_gains, kept, size_of(new))
    identity = {"to": "peft", "base": model.split.fingerprint, "trained": inventory.digest, "dtype": str(dtype)}
    with ExportFolder(folder, identity | {"config": config}, disk_bytes(new)) as export:
        if not export.is_complete:
            write_adapter_files(export, new, config, {FINGERPRINT: model.split.fingerprint})
            export.close(asdict(result))
    return result


def _factors(model: TrainedModel, ranks: Mapping[str, int], dtype: torch.dtype) -> list[NewTensor]:
    """B and A of these weights, read when their turn comes; PEFT has no rank 0, which becomes zeros of rank 1."""

    @lru_cache(maxsize=1)  # A and B of a weight are neighbours in the file
    def read(name: str) -> dict[str, Tensor]:
        trained = model.read(name)
        up_OK, down_KI = trained.up_OK, trained.down_KI
        if not len(down_KI):
            up_OK, down_KI = torch.zeros(len(up_OK), 1), torch.zeros(1, down_KI.shape[1])
        return {"A": rounded(down_KI, dtype, f"A of {name}"), "B": rounded(up_OK, dtype, f"B of {name}")}

    new = []
    modules = model.modules()
    for name, own_rank in ranks.items():
        rows, columns = model.split.weights[name]["shape"]
        rank = max(own_rank, 1)
        for letter, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            key = f"{ADAPTER_PREFIX}{modules[name]}.lora_{letter}.weight"
            new.append(NewTensor(key, DTYPE_NAMES[dtype], shape, _part(read, name, letter)))
    return new


def _part(read: Callable[[str], dict[str, Tensor]], name: str, letter: str) -> Callable[[], Tensor]:
    return lambda: read(name)[letter]


def _magnitudes(model: TrainedModel, names: Iterable[str]) -> list[NewTensor]:
    """DoRA's magnitude of these weights, made when its turn comes."""
    modules = model.modules()
    return [
        NewTensor(
            f"{ADAPTER_PREFIX}{modules[name]}.lora_magnitude_vector",
            "F32",
            (model.split.weights[name]["shape"][0],),
            partial(_magnitude, model, name),
        )
        for name in names
    ]


def _magnitude(model: TrainedModel, name: str) -> Tensor:
    """gain * ||Q + B A|| of each row, float32 [O]: PEFT divides it by the norm that it computes itself.

    Raises:
        ValueError: a norm is 0.
    """
    trained = model.read(name)
    assert trained.gain_O is not None, "the inventory found gains"
    plain_OI = model.split.residual(name).decode().addmm_(trained.up_OK, trained.down_KI)
    norms_O = torch.linalg.vector_norm(plain_OI, dim=1)
    zeros = (norms_O == 0).nonzero().flatten().tolist()
    if zeros:
        raise ValueError(
            f"{name} has {len(zeros)} rows of zeros (row {listing([str(row) for row in zeros])}), which PEFT's DoRA "
            "turns into NaN; export merged weights instead"
        )
    return trained.gain_O * norms_O
