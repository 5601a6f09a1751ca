"""A split model with adapters, for the planner: from a result of `qsvd quantize`, or from a config alone."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache

import torch

from qsvd.adapters.adapter import FEW, Adapter, AdapterOptions, chosen
from qsvd.adapters.methods import default_method, kind_of
from qsvd.checkpoint.adapter_folder import AdapterRecord
from qsvd.checkpoint.read_split import SplitFolder
from qsvd.plan.allocation import Allocation, Choice
from qsvd.plan.model import ModelPlan, WeightSpec, describe
from qsvd.plan.roles import role_of
from qsvd.plan.split_model import Skeleton, SplitModelPlan, skeleton
from qsvd.plan.tensors import AdapterTensors


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
        ValueError: the method cannot start from these ranks.
    """
    ranks = {module: choice.rank for module, choice in allocation.choices.items()}
    name = options.method or default_method(ranks.values())
    if name != "lora" and not any(ranks.values()):
        raise ValueError(f"{name} trains stored principal components, and rank 0 stores none; give lora, or a rank")
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
