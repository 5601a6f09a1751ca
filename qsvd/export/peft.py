"""Export a trained adapter as a PEFT folder for the quantized model: a LoRA, or a DoRA if rows are scaled.

Shape suffixes: O = out features, I = in features, K = rank of one weight's factors.
"""

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qsvd.errors import BadInput, listing
from qsvd.export.trained import (
    ExportFolder,
    Inventory,
    TrainedModel,
    check_dtype,
    disk_bytes,
    rounded,
    size_of,
    take_inventory,
)
from qsvd.files.adapter import FINGERPRINT
from qsvd.files.atomic import write_json
from qsvd.files.layout import ADAPTER_CONFIG, ADAPTER_PREFIX, ADAPTER_TENSORS, adapter_config
from qsvd.files.quantize_folder import PYTORCH
from qsvd.files.safetensors import DTYPE_NAMES, NewTensor, TensorEntry, new_tensor, write_stream
from qsvd.files.source import read_config
from qsvd.plan.weights import build

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

HEADS = {  # task -> ends of the paths of the modules that PEFT expects whole in the file
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def adapter_settings(
    ranks: Mapping[str, int], kept: Sequence[str], task: str | None, base: str | None
) -> dict[str, Any]:
    """Return the adapter_config.json; lora_alpha is the rank of each weight, so that every scale is 1.

    Args:
        ranks: Module path -> rank, from 1.
        kept: Module paths for modules_to_save.
        task: PEFT's task_type, or None.
        base: Path or hub id of the model that the adapter is for; None if it is in the same folder.
    """
    rank = max(ranks.values())
    pattern = {f"^{re.escape(module)}": other for module, other in ranks.items() if other != rank}
    config = adapter_config(list(ranks), rank, task, base)
    return config | {"rank_pattern": pattern, "alpha_pattern": pattern, "modules_to_save": list(kept) or None}


def kept_modules(model: TrainedModel, task: str | None) -> tuple[tuple[str, ...], list[NewTensor]]:
    """Return the paths of the modules that PEFT saves whole, and their tensors, trained or from the quantized model.

    Raises:
        BadInput: PEFT expects a head for the task and there is none; or it cannot save a parameter that was trained in
            full.
    """
    heads = HEADS.get(task or "", ())
    spelled = {name: model_name for model_name, name in model.spelling.items()}
    base = {spelled.get(name, name): entry for name, entry in model.others().items()}
    kept = {path for name in base if (path := _module(name, heads)).endswith(heads)}
    kept |= {_module(name, heads) for name in model.full}
    _check_saveable(model, kept)
    if heads and not any(path.endswith(heads) for path in kept):
        raise BadInput(
            f"PEFT loads a {task} adapter only with a module {' or '.join(heads)}, and neither {model.split.folder} "
            "nor the parameters trained in full have one; give the trained head, or task None"
        )
    whole: dict[str, Tensor | TensorEntry] = {**base, **model.full}
    inside = [name for name in whole if any(name.startswith(f"{path}.") for path in kept)]
    return tuple(sorted(kept)), [new_tensor(f"{ADAPTER_PREFIX}{name}", whole[name]) for name in sorted(inside)]


def write_adapter_files(
    folder: Path, new: Sequence[NewTensor], config: Mapping[str, Any], metadata: Mapping[str, str]
) -> None:
    """Write the two files of a PEFT folder, the config last: it marks a complete adapter."""
    write_stream(folder / ADAPTER_TENSORS, new, PYTORCH | dict(metadata))
    write_json(folder / ADAPTER_CONFIG, config)


def _module(name: str, heads: tuple[str, ...]) -> str:
    """Return the module that a parameter is saved with: its head, or else its own module."""
    owner = name.rpartition(".")[0]
    parts = owner.split(".")
    paths = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return next((path for path in paths if path.endswith(heads)), owner)


def _check_saveable(model: TrainedModel, kept: set[str]) -> None:
    """Refuse to save whole a module with split weights, or the whole model."""
    split = model.modules().values()
    refused = [path for path in sorted(kept) if not path or any(f"{other}.".startswith(f"{path}.") for other in split)]
    if refused:
        raise BadInput(
            "PEFT saves modules whole, and these have split weights: "
            f"{listing([path or 'the whole model' for path in refused])}; export merged weights instead"
        )


@dataclass(frozen=True)
class PeftExport:
    """The result of `write_peft`."""

    weights: int  # that have an adapter
    rank: int  # highest
    least_rank: int
    use_dora: bool
    kept_modules: tuple[str, ...]  # saved whole, PEFT's modules_to_save
    num_bytes: int  # of all tensors


def write_peft(
    model: TrainedModel, folder: Path, *, base: str, task: str | None, dtype: torch.dtype = torch.float32
) -> PeftExport:
    """Write the adapter that PEFT adds to the quantized model: W' = Q + B A as LoRA, gain * (Q + B A) as DoRA.

    Args:
        model: Read twice, one weight at a time.
        folder: Does not exist, is empty, or was left by the same export.
        base: Path or hub id of the quantized model.
        task: PEFT's task_type, "CAUSAL_LM"; None for a bare encoder.
        dtype: Dtype of B and A: float32, bfloat16 or float16. Other tensors keep theirs; magnitudes are float32.

    Raises:
        BadInput: the trained values are not usable; PEFT cannot run the experts, or would put layers on them; a DoRA
            would scale a row of zeros; PEFT cannot save the parameters trained in full; the folder has something else.
        DoesNotFit: the files do not fit on the disk.
    """
    check_dtype(dtype)
    inventory = take_inventory(model)
    new, config, result = peft_adapter(model, inventory, base=base, task=task, dtype=dtype)
    identity = {"to": "peft", "base": model.split.fingerprint, "trained": inventory.digest, "dtype": str(dtype)}
    with ExportFolder(folder, identity | {"config": config}, disk_bytes(new)) as export:
        if not export.is_complete:
            write_adapter_files(export.folder, new, config, {FINGERPRINT: model.split.fingerprint})
            export.finish(asdict(result))
    return result


def refuse_experts(model: TrainedModel) -> None:
    """Refuse a model with quantized experts, by BadInput: PEFT would put its layers beside other parameters."""
    stacks = [weight["stack"] for weight in model.split.weights.values() if "stack" in weight]
    if stacks:
        raise BadInput(
            f"PEFT cannot run quantized experts ({stacks[0]}); use qsvd export --to merged, or --to lora if they "
            "stayed frozen"
        )


def misplaced(config: "PreTrainedConfig", modules: list[str]) -> list[str]:
    """Return the modules that PEFT takes for experts by their names (gate_proj, up_proj, down_proj, w1 ...).

    It loads older adapters of experts so. PEFT itself puts its layers into the model, on the meta device.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if not modules or "expert" not in str(config.to_dict()):
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of patterns that PEFT itself made for experts
            settings = LoraConfig(r=1, target_modules=modules)
            filled = inject_adapter_in_model(settings, build(config), low_cpu_mem_usage=True)
        placed = {path for path, module in filled.named_modules() if hasattr(module, "lora_A")}
    except ValueError:  # it found none of the modules
        placed = set()
    lost = [module for module in modules if module not in placed]
    return lost or (modules if len(placed) > len(modules) else [])


def check_place(model: TrainedModel, modules: list[str]) -> None:
    """Refuse, by BadInput, modules that PEFT takes for experts."""
    wrong = misplaced(read_config(model.split.folder), modules)
    if wrong:
        raise BadInput(
            f"PEFT would put the LoRA of {listing(wrong)} on the experts, since their names are those of experts; use "
            "--to merged, or train other layers (--target-modules q_proj k_proj v_proj o_proj)"
        )


def peft_adapter(
    model: TrainedModel, inventory: Inventory, *, base: str | None, task: str | None, dtype: torch.dtype
) -> tuple[list[NewTensor], dict[str, Any], PeftExport]:
    """Return the tensors, the adapter_config.json and the sizes of the adapter that `write_peft` writes."""
    refuse_experts(model)
    kept, whole = kept_modules(model, task)
    stored = model.split.ranks  # transformers puts the stored components on these weights, and PEFT must replace them
    adapted = {name: rank for name, rank in inventory.ranks.items() if rank or stored[name]} or inventory.ranks
    magnitudes = _magnitudes(model, adapted) if inventory.has_gains else ()
    new = [*_factors(model, adapted, dtype), *whole, *magnitudes]
    modules = model.modules()
    ranks = {modules[name]: max(rank, 1) for name, rank in adapted.items()}
    check_place(model, [*ranks])
    config = adapter_settings(ranks, kept, task, base) | {"use_dora": inventory.has_gains}
    result = PeftExport(len(ranks), max(ranks.values()), min(ranks.values()), inventory.has_gains, kept, size_of(new))
    return new, config, result


def _factors(model: TrainedModel, ranks: Mapping[str, int], dtype: torch.dtype) -> list[NewTensor]:
    """Return B and A of these weights. PEFT has no rank 0; it becomes zeros of rank 1."""

    @lru_cache(maxsize=1)  # A and B of a weight are written one after the other
    def read(name: str) -> dict[str, Tensor]:
        trained = model.read(name)
        up_OK, down_KI = trained.up_OK, trained.down_KI
        if not len(down_KI):
            up_OK, down_KI = torch.zeros(len(up_OK), 1), torch.zeros(1, down_KI.shape[1])
        return {"A": rounded(down_KI, dtype, f"A of {name}"), "B": rounded(up_OK, dtype, f"B of {name}")}

    def part(name: str, letter: str) -> Tensor:
        return read(name)[letter]

    new = []
    modules = model.modules()
    for name, own_rank in ranks.items():
        rows, columns = model.split.weights[name]["shape"]
        rank = max(own_rank, 1)
        for letter, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            key = f"{ADAPTER_PREFIX}{modules[name]}.lora_{letter}.weight"
            new.append(NewTensor(key, DTYPE_NAMES[dtype], shape, partial(part, name, letter)))
    return new


def _magnitudes(model: TrainedModel, names: Iterable[str]) -> list[NewTensor]:
    """Return DoRA's magnitudes of these weights."""
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
    """Return gain * ||Q + B A|| of each row, float32 [O]: PEFT divides it by the norm that it computes itself."""
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
