"""Prepare `qsvd plan`: the model to plan, the limits to plan against, and what is refused before that."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qsvd.adapters.adapter import AdapterOptions
from qsvd.adapters.methods import default_method
from qsvd.adapters.start import new_record, planned, planner_of
from qsvd.errors import BadInput, parse_size
from qsvd.files.pages import free_host_memory
from qsvd.files.source import download_config, read_config
from qsvd.files.split_folder import SplitFolder, open_split
from qsvd.files.workspace import MANIFEST
from qsvd.memory.block_bytes import Batch
from qsvd.memory.duration import Rate, Speed
from qsvd.memory.items import Limits
from qsvd.memory.placement import Wish
from qsvd.memory.split_model import SplitModelPlan, skeleton
from qsvd.memory.training import Training
from qsvd.numerics.nf4 import NormalFloat4
from qsvd.options import Plan, Quantize
from qsvd.plan.allocation import Allocation, Choice, uniform
from qsvd.plan.budget import assumed, most_rank_within
from qsvd.plan.weights import WeightSpec, context_length, plan_model, unsplittable
from qsvd.prepare.check_options import check
from qsvd.prepare.machine import measured_flops, measured_link
from qsvd.prepare.quantize import read_table

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

DTYPE = torch.bfloat16  # to compute in, on a GPU
MOST_TOKENS = 2048  # of a sequence, unless --tokens asks for more
FLOPS, LINK, DISK = 1e14, 25e9, 3e9  # assumed, per second: operations and bytes, of a PCIe 4 GPU and an NVMe disk


@dataclass(frozen=True)
class PlanSource:
    """The model to plan.

    Args:
        make: Returns the planned model at a rank.
        rank: The rank to plan.
        most_rank: The highest rank possible.
        is_fixed: Whether no rank but the highest stored one can be trained.
        notes: Sentences about what is assumed.
        is_split: Whether the model is quantized already.
    """

    make: Callable[[int], SplitModelPlan]
    rank: int
    most_rank: int
    is_fixed: bool
    notes: tuple[str, ...]
    is_split: bool = False


@dataclass(frozen=True)
class PlanJob:
    """A checked run of `qsvd plan`; context is the number of tokens that the model can read."""

    options: Plan
    source: PlanSource
    context: int
    training: Training
    limits: Limits
    wish: Wish
    speed: Speed

    @property
    def model(self) -> SplitModelPlan:
        """The planned model at the rank to plan."""
        return self.source.make(self.source.rank)


def prepare_plan(options: Plan) -> PlanJob:
    """Read the config and refuse what cannot be planned."""
    check(options)
    limits = _limits(options)
    source = plan_source(options)
    context = context_length(source.make(source.rank).text_config, unlimited=2**20)
    tokens = min(MOST_TOKENS, context) if options.tokens is None else options.tokens
    if tokens > context:
        raise BadInput(f"--tokens {tokens} is above the context length of the model, {context}")
    batch = Batch(
        tokens=tokens,
        batch=options.batch,
        is_masked=options.batch > 1,
        checkpointing=options.gradient_checkpointing,
        device="cuda",
    )
    optimizer = "paged_adamw_8bit" if options.optimizer == "auto" else options.optimizer
    return PlanJob(
        options=options,
        source=source,
        context=context,
        training=Training(batch, options.accumulate, optimizer, options.layer_major),
        limits=limits,
        wish=Wish(options.resident),
        speed=_speed(options),
    )


def plan_source(options: Plan) -> PlanSource:
    """Read the config of a 16-bit model, or the record of a quantized one."""
    adapter = AdapterOptions(None if options.method == "auto" else options.method, dtype=options.adapter_dtype)
    folder = Path(options.model).expanduser()
    if (folder / MANIFEST).is_file():
        return _of_quantized(options, open_split(folder), adapter)
    return _of_config(options, read_config(folder if folder.exists() else download_config(options.model)), adapter)


def _of_config(options: Plan, config: "PreTrainedConfig", adapter: AdapterOptions) -> PlanSource:
    """Return a 16-bit model as qsvd quantize would store it."""
    if getattr(config, "quantization_config", None) is not None:
        raise BadInput(f"{options.model} is quantized already; give the 16-bit model, or a model that qsvd quantized")
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
    rank = min(Quantize.rank, most_rank) if options.rank is None else options.rank
    if rank > most_rank or (is_fixed and options.rank not in (None, most_rank)):
        why = "the shorter side of the smallest layer"
        if is_fixed or options.budget is not None:
            why = "the rank in --allocation" if is_fixed else f"the highest rank in --budget {options.budget}"
        raise BadInput(f"--rank {rank} is {'not' if is_fixed else 'above'} {most_rank}, {why}")
    notes = _notes(options, stacks, is_plain=is_plain)
    return PlanSource(make, most_rank if is_fixed else rank, most_rank, is_fixed, notes)


def _notes(options: Plan, stacks: Sequence[str], *, is_plain: bool) -> tuple[str, ...]:
    notes = ("lora is planned without stored components (rank 0), as in QLoRA.",) if is_plain else ()
    if stacks:
        notes += (f"{len(stacks)} layers cannot be quantized and are counted in 16 bits: {stacks[0]}, ...",)
    if options.budget is not None:
        notes += ("Only the total size of a budget is used here; qsvd allocate chooses bits per layer.",)
    if options.allocation is not None:
        notes += (f"Bits and rank of each layer are from {options.allocation}.",)
    return notes


def _allocation_of(options: Plan, weights: Sequence[WeightSpec]) -> Callable[[int], Allocation]:
    """Return the function from a rank to an allocation: NF4, a mixture that fits the budget, or the given table."""
    if options.allocation is not None:
        table, _ = read_table(options.allocation, weights)
        return lambda _: table
    budget = options.budget
    if budget is not None:
        return cache(partial(assumed, weights, budget))
    codec = NormalFloat4(double_quant=options.double_quant)
    return lambda rank: uniform(weights, Choice(codec, rank))


def _of_quantized(options: Plan, split: SplitFolder, adapter: AdapterOptions) -> PlanSource:
    """Return a quantized model with an adapter."""
    if options.budget is not None or options.allocation is not None:
        raise BadInput(f"{split.folder} is quantized already; --budget and --allocation are for 16-bit models")
    stored = max(split.ranks.values())
    record, model_of = new_record(split, adapter), planner_of(split, DTYPE)
    is_fixed = record.method == "pissa"
    if is_fixed and options.rank not in (None, stored):
        raise BadInput(f"--rank {options.rank} is not {stored}, the stored rank, which pissa trains; leave --rank out")

    def make(rank: int) -> SplitModelPlan:
        trained = AdapterOptions(record.method, None if is_fixed else rank, None, adapter.dtype)
        return model_of(new_record(split, trained))

    rank = options.rank or (Quantize.rank if record.method == "lora" else stored)
    notes = (f"{split.folder} is quantized already: its stored ranks and formats are used.",)
    if record.method == "lora":
        stored = min(min(weight["shape"]) for weight in split.weights.values())
    return PlanSource(make, rank, stored, is_fixed, notes, is_split=True)


def _speed(options: Plan) -> Speed:
    """Return the speeds that are given, else measured on the GPU of this machine, else assumed."""
    has_gpu = torch.cuda.is_available()
    flops = Rate(measured_flops(), "measured") if has_gpu and options.tflops is None else Rate(FLOPS)
    link = Rate(measured_link(), "measured") if has_gpu and options.link is None else Rate(LINK)
    return Speed(
        flops if options.tflops is None else Rate(1e12 * options.tflops, "given"),
        link if options.link is None else Rate(1e9 * options.link, "given"),
        Rate(DISK) if options.disk is None else Rate(1e9 * options.disk, "given"),
    )


def _limits(options: Plan) -> Limits:
    """Return the limits that are given, else those of this machine if it has a GPU."""
    has_gpu = torch.cuda.is_available()
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory if has_gpu else None
    host = free_host_memory() if has_gpu else None
    return Limits(
        gpu=gpu if options.gpu is None else parse_size(options.gpu, "--gpu"),
        host=host if options.host is None else parse_size(options.host, "--host"),
    )
