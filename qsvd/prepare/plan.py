"""What `qsvd plan` counts, and against what: everything that can be refused before it counts."""

import math
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
from qsvd.plan.assumed import assumed, most_rank_within
from qsvd.plan.weights import WeightSpec, context_length, plan_model, unsplittable
from qsvd.prepare.machine import measured_flops, measured_link
from qsvd.prepare.quantize import read_table

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# The split model that `qsvd plan` counts: a result of `qsvd quantize`, or what a config will become.


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
        BadInput: the model is none that can be split, or the options do not go with it.
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
            raise BadInput(f"no config.json in {path.parent}; give a transformers checkpoint or a config.json")
    elif not path.is_file():
        path = download_config(model)
    return read_config(path)


def _of_config(options: Plan, config: "PreTrainedConfig", adapter: AdapterOptions) -> PlanSource:
    """A model that is still in 16 bits."""
    if getattr(config, "quantization_config", None) is not None:
        raise BadInput(f"{options.model} is quantized already; give the 16-bit model, or a result of qsvd quantize")
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
        why = "the shorter side of the smallest weight"
        if is_fixed or options.budget is not None:
            why = "which the table says" if is_fixed else f"the highest that --budget {options.budget} holds"
        raise BadInput(f"--rank {rank} is {'not' if is_fixed else 'above'} {most_rank}, {why}")
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
        BadInput: there is a table and a budget, or the table does not fit the model.
    """
    if options.allocation is not None:
        if options.budget is not None:
            raise BadInput("--budget and --allocation: one of them says how many bits a weight gets; leave one out")
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
        raise BadInput(f"{split.folder} is split already: --budget and --allocation are for 16-bit models")
    stored = max(split.ranks.values())
    record, model_of = new_record(split, adapter), planner_of(split, DTYPE)
    is_fixed = record.method == "pissa"
    if is_fixed and options.rank not in (None, stored):
        raise BadInput(f"--rank {options.rank} is not the stored rank {stored}, which pissa trains: leave it out")

    def make(rank: int) -> SplitModelPlan:
        trained = AdapterOptions(record.method, None if is_fixed else rank, None, adapter.dtype)
        return model_of(new_record(split, trained))

    rank = options.rank or (Quantize.rank if record.method == "lora" else stored)
    notes = (f"{split.folder} is split already: its stored ranks and its quantization count.",)
    if record.method == "lora":
        stored = min(min(weight["shape"]) for weight in split.weights.values())
    return PlanSource(make, rank, stored, is_fixed, notes, is_split=True)


MOST_TOKENS = 2048  # of a sequence, unless more are asked for
FLOPS, LINK, DISK = 1e14, 25e9, 3e9  # assumed: operations and bytes a second, of a card on PCIe 4 and an NVMe disk


@dataclass(frozen=True)
class PlanJob:
    """A checked question.

    Args:
        source: The model.
        context: Tokens that the model can read, as far as its config says.
    """

    options: Plan
    source: PlanSource
    context: int
    training: Training
    limits: Limits
    wish: Wish
    speed: Speed

    @property
    def model(self) -> SplitModelPlan:
        return self.source.make(self.source.rank)


def prepare_plan(options: Plan) -> PlanJob:
    """Read the config, and refuse what cannot be planned.

    Raises:
        BadInput: an option is not usable, or the model is none that can be split.
    """
    _check_numbers(options)
    limits = _limits(options)
    source = plan_source(options)
    context = context_length(source.make(source.rank).text_config, unlimited=2**20)
    tokens = min(MOST_TOKENS, context) if options.tokens is None else options.tokens
    if tokens > context:
        raise BadInput(f"--tokens {tokens} is above the {context} positions of the model")
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


def _speed(options: Plan) -> Speed:
    """As given, or as the card here does, or as a common one does."""
    has_gpu = torch.cuda.is_available()
    flops = Rate(measured_flops(), "measured") if has_gpu and options.tflops is None else Rate(FLOPS)
    link = Rate(measured_link(), "measured") if has_gpu and options.link is None else Rate(LINK)
    return Speed(
        flops if options.tflops is None else Rate(1e12 * options.tflops, "given"),
        link if options.link is None else Rate(1e9 * options.link, "given"),
        Rate(DISK) if options.disk is None else Rate(1e9 * options.disk, "given"),
    )


def _limits(options: Plan) -> Limits:
    """As given, or what is here."""
    has_gpu = torch.cuda.is_available()
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory if has_gpu else None
    host = free_host_memory() if has_gpu else None
    return Limits(
        gpu=gpu if options.gpu is None else parse_size(options.gpu, "--gpu"),
        host=host if options.host is None else parse_size(options.host, "--host"),
    )


def _check_numbers(options: Plan) -> None:
    """Every number that is out of its range, in one sentence."""
    least = {
        "tokens": (options.tokens, 2),
        "batch": (options.batch, 1),
        "accumulate": (options.accumulate, 1),
        "rank": (options.rank, 0),
    }
    wrong = [
        f"--{name} {value} is below {low}" for name, (value, low) in least.items() if value is not None and value < low
    ]
    above = {"tflops": options.tflops, "link": options.link, "disk": options.disk}
    wrong += [
        f"--{name} {value:g} is no number above 0"
        for name, value in above.items()
        if value is not None and not 0 < value < math.inf
    ]
    if options.resident != "auto" and not 0 <= options.resident <= 1:
        wrong.append(f"--resident {options.resident:g} is neither auto nor a share from 0 to 1")
    if options.layer_major and not options.gradient_checkpointing:
        wrong.append("--layer-major computes each batch of a block again: leave --no-gradient-checkpointing out")
    if wrong:
        raise BadInput("; ".join(wrong))
