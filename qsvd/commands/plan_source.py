"""The split model that `qsvd plan` counts: a result of `qsvd quantize`, or what a config will become."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qsvd.adapters.adapter import AdapterOptions
from qsvd.adapters.methods import default_method
from qsvd.adapters.planned import planned, planner_of
from qsvd.adapters.start import new_record
from qsvd.checkpoint.hub import download_config
from qsvd.checkpoint.read import read_config
from qsvd.checkpoint.read_split import SplitFolder, open_split
from qsvd.checkpoint.write import MANIFEST
from qsvd.commands.prepare import read_table
from qsvd.numerics.normal_float import NormalFloat4
from qsvd.options import Plan
from qsvd.plan.allocation import Allocation, Choice, uniform
from qsvd.plan.assumed import assumed, most_rank_within
from qsvd.plan.model import WeightSpec, plan_model, unsplittable
from qsvd.plan.split_model import SplitModelPlan, skeleton

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

RANK = 64  # where nothing is stored and none is given
DTYPE = torch.bfloat16  # to compute in, on a GPU


@dataclass(frozen=True)
class PlanSource:
    """What is asked about.

    Args:
        make: The split model at a rank.
        rank: The one that is asked for.
        most_rank: The highest that there is.
        is_fixed: Whether `rank` is the highest of the stored ones, and no others can be trained.
        notes: A sentence each.
        is_split: Whether it is a result of `qsvd quantize` already.
    """

    make: Callable[[int], SplitModelPlan]
    rank: int
    most_rank: int
    is_fixed: bool
    notes: tuple[str, ...]
    is_split: bool = False


def plan_source(options: Plan) -> PlanSource:
    """Read the config.

    Raises:
        ValueError: the model is none that can be split, or the options do not go with it.
    """
    adapter = AdapterOptions(None if options.method == "auto" else options.method, dtype=options.adapter_dtype)
    folder = Path(options.model).expanduser()
    if (folder / MANIFEST).is_file():
        return _of_split(options, open_split(folder), adapter)
    return _of_config(options, _config(options.model, folder), adapter)


def _config(model: str, path: Path) -> "PreTrainedConfig":
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise ValueError(f"no config.json in {path.parent}; give a transformers checkpoint or a config.json")
    elif not path.is_file():
        path = download_config(model)
    return read_config(path)


def _of_config(options: Plan, config: "PreTrainedConfig", adapter: AdapterOptions) -> PlanSource:
    """A model that is still in 16 bits."""
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{options.model} is quantized already; give the 16-bit model, or a result of qsvd quantize")
    stacks = unsplittable(config)
    names = plan_model(config, exclude=stacks)
    empty = skeleton(config, DTYPE)
    is_plain = adapter.method == "lora" and options.allocation is None
    allocation_of = _allocation_of(options, names.weights)
    if options.allocation is not None and adapter.method is None:
        method = default_method(choice.rank for choice in allocation_of(0).choices.values())
        adapter = replace(adapter, method=method)

    def make(rank: int) -> SplitModelPlan:
        trained = AdapterOptions("lora", rank or None, None, adapter.dtype) if adapter.method == "lora" else adapter
        return planned(empty, names, allocation_of(0 if is_plain else rank), options=trained)

    is_fixed = options.allocation is not None and adapter.method != "lora"
    most_rank = min(min(spec.shape) for spec in names.weights)
    if options.budget is not None and not is_plain:
        most_rank = most_rank_within(names.weights, options.budget)
    if is_fixed:
        most_rank = max(choice.rank for choice in allocation_of(0).choices.values())
    rank = min(RANK, most_rank) if options.rank is None else options.rank
    if rank > most_rank or (is_fixed and options.rank not in (None, most_rank)):
        why = "the shorter side of the smallest weight"
        if is_fixed or options.budget is not None:
            why = "which the table says" if is_fixed else f"the highest that --budget {options.budget} holds"
        raise ValueError(f"--rank {rank} is {'not' if is_fixed else 'above'} {most_rank}, {why}")
    notes = _notes(options, stacks, is_plain=is_plain)
    return PlanSource(make, most_rank if is_fixed else rank, most_rank, is_fixed, notes)


def _notes(options: Plan, stacks: Sequence[str], *, is_plain: bool) -> tuple[str, ...]:
    notes = ("lora is counted on the residual alone (rank 0), as QLoRA does.",) if is_plain else ()
    if stacks:
        notes += (f"{len(stacks)} weights of the blocks cannot be split and are counted in 16 bits: {stacks[0]}, ...",)
    if options.budget is not None:
        notes += ("Of a budget the bytes are known here; which weight gets which bits is for qsvd allocate to find.",)
    if options.allocation is not None:
        notes += (f"{options.allocation} says bits and rank of every weight.",)
    return notes


def _allocation_of(options: Plan, weights: Sequence[WeightSpec]) -> Callable[[int], Allocation]:
    """What every weight gets at a rank: one codec, a mixture that fits the budget, or what a table says.

    Raises:
        ValueError: there is a table and a budget, or the table does not fit the model.
    """
    if options.allocation is not None:
        if options.budget is not None:
            raise ValueError("--budget and --allocation: one of them says how many bits a weight gets; leave one out")
        table = read_table(options.allocation, weights).allocation
        return lambda _: table
    budget = options.budget
    if budget is not None:
        return cache(partial(assumed, weights, budget))
    codec = NormalFloat4(double_quant=options.double_quant)
    return lambda rank: uniform(weights, Choice(codec, rank))


def _of_split(options: Plan, split: SplitFolder, adapter: AdapterOptions) -> PlanSource:
    """A result of `qsvd quantize`."""
    if options.budget is not None or options.allocation is not None:
        raise ValueError(f"{split.folder} is split already: --budget and --allocation are for 16-bit models")
    stored = max(split.ranks.values())
    record, model_of = new_record(split, adapter), planner_of(split, DTYPE)
    is_fixed = record.method == "pissa"
    if is_fixed and options.rank not in (None, stored):
        raise ValueError(f"--rank {options.rank} is not the stored rank {stored}, which pissa trains: leave it out")

    def make(rank: int) -> SplitModelPlan:
        trained = AdapterOptions(record.method, None if is_fixed else rank, None, adapter.dtype)
        return model_of(new_record(split, trained))

    rank = options.rank or (RANK if record.method == "lora" else stored)
    notes = (f"{split.folder} is split already: its stored ranks and its quantization count.",)
    if record.method == "lora":
        stored = min(min(weight["shape"]) for weight in split.weights.values())
    return PlanSource(make, rank, stored, is_fixed, notes, is_split=True)
