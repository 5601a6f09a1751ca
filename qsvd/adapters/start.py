"""Which adapter, and the adapter of each weight before its first step."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from qsvd.adapters.adapter import FEW, Adapter, AdapterOptions, Principal, chosen
from qsvd.adapters.methods import METHODS, default_method, kind_of, no_components
from qsvd.errors import BadInput
from qsvd.files.adapter import AdapterFolder, AdapterRecord
from qsvd.files.safetensors import read_tensor
from qsvd.files.split_folder import SplitFolder
from qsvd.memory.split_model import Skeleton, SplitModelPlan, skeleton
from qsvd.plan.allocation import Allocation, Choice
from qsvd.plan.tensors import AdapterTensors
from qsvd.plan.weights import ModelPlan, WeightSpec, describe, role_of


def new_record(split: SplitFolder, options: AdapterOptions, labels: tuple[str, ...] = ()) -> AdapterRecord:
    """The record of a new adapter, on disk as in memory.

    Raises:
        BadInput: the method or the dtype is unknown, or there is only one label.
    """
    method = options.method
    if method is None:
        method = default_method(split.ranks.values())
    check_method(method)
    if len(labels) == 1:
        raise BadInput(f"labels has the one class {labels[0]!r}; a classifier needs at least two")
    return AdapterRecord(
        base=str(split.folder.resolve()),
        fingerprint=split.fingerprint,
        method=method,
        rank=options.rank,
        alpha=options.alpha,
        dtype=_dtype_name(split, method, options),
        seed=options.seed,
        labels=labels,
    )


def check_method(method: str) -> None:
    """Refuse a method that there is not."""
    if method not in METHODS:
        raise BadInput(f"method {method!r} is none of {', '.join(METHODS)}")


def _dtype_name(split: SplitFolder, method: str, options: AdapterOptions) -> str:
    """Of the trained parameters: as told, or float32 while they are few."""
    if options.dtype in ("float32", "bfloat16"):
        return options.dtype
    if options.dtype != "auto":
        raise BadInput(f"adapter dtype {options.dtype!r} is none of auto, float32, bfloat16")
    count = 0
    for name, weight in split.weights.items():
        kind = kind_of(method, split.ranks[name], split.ranks.values())
        rank, _ = chosen(options, kind.defaults, weight["rank"])
        count += kind.num_parameters(tuple(weight["shape"]), rank)
    return "float32" if count <= FEW else "bfloat16"


def start_adapter(split: SplitFolder, record: AdapterRecord, name: str, device: torch.device) -> Adapter:
    """The adapter of one weight before its first step.

    Args:
        name: Of the weight's tensor in the base.

    Raises:
        BadInput: the method cannot start from the weight's factors; the sentence names the weight.
    """
    return start_from(read_principal(split, name, device, record.method), split, record, name)


def read_principal(
    split: SplitFolder, name: str, device: torch.device, method: str, *, is_paged: bool = False
) -> Principal:
    """One weight as it is stored, read once.

    Args:
        is_paged: Leave the residual in its file, unless the method starts from its values.
    """
    up_OR, down_RI = stored_factors(split, name)
    kind = kind_of(method, split.ranks[name], split.ranks.values())
    if is_paged and not kind.starts_from_residual:
        residual = split.residual(name, mapped=True)
    else:
        residual = split.residual(name).to(device)
    return Principal(residual, up_OR.to(device), down_RI.to(device))


def stored_factors(split: SplitFolder, name: str) -> tuple[Tensor, Tensor]:
    """B [O, R] and A [R, I] of one weight; R is 0 where nothing but the residual is stored."""
    rows, columns = split.weights[name]["shape"]
    return split.factors(name) or (torch.zeros(rows, 0), torch.zeros(0, columns))


def start_from(principal: Principal, split: SplitFolder, record: AdapterRecord, name: str) -> Adapter:
    """As `start_adapter`, of a weight that is read already."""
    options = AdapterOptions(record.method, record.rank, record.alpha, record.dtype, record.seed)
    digest = hashlib.sha256(f"{record.seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:6]))
    try:
        return kind_of(record.method, principal.rank, split.ranks.values()).start(principal, options, generator)
    except ValueError as error:
        raise BadInput(f"{split.folder}: {name}: {error}") from error


def trained_adapter(split: SplitFolder, adapter: AdapterFolder, name: str, module: str) -> Adapter:
    """The adapter of one weight as it was saved, on the CPU.

    Args:
        name: Of the weight's tensor in the base.
        module: Path of its module in the trained model.

    Raises:
        BadInput: the folder lacks parameters of it.
    """
    made = start_adapter(split, adapter.record, name, torch.device("cpu")).requires_grad_(False)
    missing = [f"{module}.{part}" for part, _ in made.named_parameters() if f"{module}.{part}" not in adapter.tensors]
    if missing:
        raise BadInput(f"{adapter.folder} lacks {', '.join(missing)}")
    for part, parameter in made.named_parameters():
        parameter.copy_(read_tensor(adapter.tensors[f"{module}.{part}"]))
    return made


# A split model with adapters, for the planner: from a result of `qsvd quantize`, or from a config alone.


def planned_base(split: SplitFolder, record: AdapterRecord, dtype: torch.dtype) -> SplitModelPlan:
    """What `load` would make of a result of `qsvd quantize` and a record of its adapters; no weight is read."""
    return planner_of(split, dtype)(record)


def planner_of(split: SplitFolder, dtype: torch.dtype) -> Callable[[AdapterRecord], SplitModelPlan]:
    """The same for several records of one base, which is opened once."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(split.folder, local_files_only=True)
    delattr(config, "quantization_config")
    config.architectures = [split.manifest["source"]["architecture"]]
    empty = skeleton(config, dtype)
    names = replace(describe(empty.model), weights=tuple(_spec(name, w) for name, w in split.weights.items()))
    choices = {w["module"]: Choice(split.codec(name), w["rank"]) for name, w in split.weights.items()}
    stored = getattr(torch, split.manifest["run"]["dtype"])

    def make(record: AdapterRecord) -> SplitModelPlan:
        options = AdapterOptions(record.method, record.rank, record.alpha, record.dtype, record.seed)
        return planned(empty, names, Allocation(choices), options=options, stored_dtype=stored)

    return make


def planned(
    empty: Skeleton,
    names: ModelPlan,
    allocation: Allocation,
    *,
    options: AdapterOptions,
    stored_dtype: torch.dtype = torch.bfloat16,
) -> SplitModelPlan:
    """A split model that may not exist yet.

    Args:
        empty: The 16-bit model, without memory.
        names: What of it is split.
        allocation: Codec and stored rank of each.
        options: Of the adapters; method None is pissa, or lora where nothing is stored.
        stored_dtype: Of the stored factors.

    Raises:
        BadInput: the method cannot start from these ranks.
    """
    ranks = {module: choice.rank for module, choice in allocation.choices.items()}
    name = options.method or default_method(ranks.values())
    if METHODS[name].needs_components and not any(ranks.values()):
        raise no_components(name)
    kinds = {module: kind_of(name, rank, ranks.values()) for module, rank in ranks.items()}
    trained = {module: chosen(options, kind.defaults, ranks[module])[0] for module, kind in kinds.items()}
    count = sum(kinds[spec.module].num_parameters(spec.shape, trained[spec.module]) for spec in names.weights)
    dtype = torch_dtype(options.dtype, count)

    @cache  # one record for all weights that are alike
    def tensors(kind: type[Adapter], shape: tuple[int, int], stored_rank: int, rank: int) -> AdapterTensors:
        return kind.tensors(shape, stored_rank, rank, dtype, stored_dtype)

    adapters = {
        spec.name: tensors(kinds[spec.module], spec.shape, ranks[spec.module], trained[spec.module])
        for spec in names.weights
    }
    return SplitModelPlan(empty, names, allocation, adapters)


def torch_dtype(name: str, count: int) -> torch.dtype:
    """Of so many trained parameters: as named, or float32 while they are few."""
    if name == "auto":
        return torch.float32 if count <= FEW else torch.bfloat16
    return getattr(torch, name)


def _spec(name: str, weight: Mapping[str, object]) -> WeightSpec:
    module, shape = str(weight["module"]), weight["shape"]
    assert isinstance(shape, list), "as qsvd quantize writes it"
    layer = next(int(part) for part in module.split(".") if part.isdigit())
    return WeightSpec(name, module, (int(shape[0]), int(shape[1])), role_of(module), layer)
