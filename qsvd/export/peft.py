"""A trained adapter as a PEFT folder for the base: a LoRA, or a DoRA where rows are scaled.

Shape suffixes: O = out features, I = in features, K = rank of one weight's factors.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qsvd.errors import BadInput, listing
from qsvd.export.folder import ExportFolder, disk_bytes, size_of
from qsvd.export.trained import TrainedModel, check_dtype, rounded, take_inventory
from qsvd.files.adapter import FINGERPRINT
from qsvd.files.atomic import write_json
from qsvd.files.layout import ADAPTER_PREFIX, adapter_config
from qsvd.files.output import PYTORCH
from qsvd.files.safetensors import DTYPE_NAMES, NewTensor, TensorEntry, new_tensor, write_stream

# What every PEFT folder needs besides its factors: the config, and modules that are saved whole.


TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
HEADS = {  # task -> ends of the paths of modules that PEFT itself expects whole in the file
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def adapter_settings(ranks: Mapping[str, int], kept: Sequence[str], task: str | None, base: str) -> dict[str, Any]:
    """The adapter_config.json; lora_alpha is the rank of each weight, so that every scale is 1.

    Args:
        ranks: Module path -> rank, from 1.
        kept: Paths for modules_to_save.
        task: PEFT's task_type, or None.
        base: Where a loader finds the base.
    """
    rank = max(ranks.values())
    pattern = {f"^{re.escape(module)}": other for module, other in ranks.items() if other != rank}
    config = adapter_config(list(ranks), rank, task, base)
    return config | {"rank_pattern": pattern, "alpha_pattern": pattern, "modules_to_save": list(kept) or None}


def kept_modules(model: TrainedModel, task: str | None) -> tuple[tuple[str, ...], list[NewTensor]]:
    """Paths of the modules that PEFT saves whole, and their tensors: trained ones, and from the base what was not.

    Raises:
        BadInput: PEFT expects a head for the task, and there is none; or it cannot save a parameter that was trained
            in full.
    """
    heads = HEADS.get(task or "", ())
    spelled = {name: model_name for model_name, name in model.spelling.items()}
    base = {spelled.get(name, name): entry for name, entry in model.others().items()}
    kept = {path for name in base if (path := _module(name, heads)).endswith(heads)}
    kept |= {_module(name, heads) for name in model.full}
    _check_saveable(model, kept)
    if heads and not any(path.endswith(heads) for path in kept):
        raise BadInput(
            f"PEFT loads a {task} adapter only with a module {' or '.join(heads)} inside, and neither "
            f"{model.split.folder} nor what was trained in full has one; give the trained head, or task None"
        )
    whole: dict[str, Tensor | TensorEntry] = {**base, **model.full}
    inside = [name for name in whole if any(name.startswith(f"{path}.") for path in kept)]
    return tuple(sorted(kept)), [new_tensor(f"{ADAPTER_PREFIX}{name}", whole[name]) for name in sorted(inside)]


def write_adapter_files(
    export: ExportFolder, new: Sequence[NewTensor], config: Mapping[str, Any], metadata: Mapping[str, str]
) -> None:
    """The two files of a PEFT folder, the config last: where it is, the adapter is whole."""
    write_stream(export.folder / TENSORS, new, PYTORCH | dict(metadata))
    write_json(export.folder / CONFIG, config)


def _module(name: str, heads: tuple[str, ...]) -> str:
    """The module that a parameter is saved with: the head it is in, or else its own."""
    owner = name.rpartition(".")[0]
    parts = owner.split(".")
    paths = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return next((path for path in paths if path.endswith(heads)), owner)


def _check_saveable(model: TrainedModel, kept: set[str]) -> None:
    """Refuse modules that are split themselves or have split weights inside, and the whole model."""
    split = model.modules().values()
    refused = [path for path in sorted(kept) if not path or any(f"{other}.".startswith(f"{path}.") for other in split)]
    if refused:
        raise BadInput(
            f"PEFT saves modules whole, and {listing([path or 'the whole model' for path in refused])} would be one, "
            "with split weights inside; export merged weights instead"
        )


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
        BadInput: the trained values are not usable; a row that a DoRA must scale is zero; PEFT cannot save what was
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
            export.finish(asdict(result))
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
        BadInput: a norm is 0.
    """
    trained = model.read(name)
    assert trained.gain_O is not None, "the inventory found gains"
    plain_OI = model.split.residual(name).decode().addmm_(trained.up_OK, trained.down_KI)
    norms_O = torch.linalg.vector_norm(plain_OI, dim=1)
    zeros = (norms_O == 0).nonzero().flatten().tolist()
    if zeros:
        raise BadInput(
            f"{name} has {len(zeros)} rows of zeros (row {listing([str(row) for row in zeros])}), which PEFT's DoRA "
            "turns into NaN; export merged weights instead"
        )
    return trained.gain_O * norms_O
