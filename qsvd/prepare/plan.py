"""Prepare `qsvd plan`: the model to plan, the limits to plan against, and what is refused before that."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qsvd.adapters.adapter import AdapterOptions
from qsvd.adapters.methods.table import METHODS, default_method
from qsvd.adapters.start import new_record, planned, planner_of
from qsvd.data.examples import MOST_LENGTH, Home, read_run_data
from qsvd.errors import BadInput, parse_size
from qsvd.files.source import download_config, read_config, small_files
from qsvd.files.split_folder import SplitFolder, open_split
from qsvd.files.workspace import MANIFEST
from qsvd.memory.device import device_of, dtype_of, free_host_memory
from qsvd.memory.duration import GPU, Rate, Speed
from qsvd.memory.items import Limits
from qsvd.memory.placement import Wish
from qsvd.memory.split_model import SplitModelPlan, skeleton
from qsvd.memory.training import Training
from qsvd.options import Plan, Quantize, Train, TrainingOptions
from qsvd.plan.allocation import Allocation, Choice, Table, tables_of, uniform, usual_codec
from qsvd.plan.budget import assumed, most_rank_within
from qsvd.plan.weights import ModelPlan, WeightSpec, context_length, coverage, plan_model, unsplittable
from qsvd.prepare.allocate import read_table
from qsvd.prepare.check_options import check
from qsvd.prepare.machine import (
    Machine,
    check_offload,
    divided,
    machine,
    measured_flops,
    measured_link,
    part_of,
    training_of,
    wish_of,
    with_batches,
)
from qsvd.prepare.train import PlannedRun, adapter_options_of, check_pairs, plan_run, prepare_run, starting_options
from qsvd.training.run_folder import Recorded, recorded

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CPU_FLOPS = 2e10  # assumed, of one core: products in float32
MUCH = 0.9  # share of a model that is quantized; below it the plan says what makes it more
NO_GPU = "There is no GPU here: one without a limit is assumed. Give --gpu and --host, or --device cpu."


@dataclass(frozen=True)
class PlanSource:
    """The model to plan.

    Args:
        make: Returns the planned model at a rank.
        rank: The rank to plan.
        most_rank: The highest rank possible.
        is_fixed: Whether no rank but the highest stored one can be trained.
        notes: Sentences about what is assumed.
        architecture: Its class in transformers.
        is_split: Whether the model is quantized already.
    """

    make: Callable[[int], SplitModelPlan]
    rank: int
    most_rank: int
    is_fixed: bool
    notes: tuple[str, ...]
    architecture: str
    is_split: bool = False


@dataclass(frozen=True)
class PlanJob:
    """A checked run of `qsvd plan`.

    Args:
        context: Number of tokens that the model can read.
        training: What is trained; with --gpus, the part of each GPU.
        run: The training run that DATA gives; None without DATA.
    """

    options: Plan
    source: PlanSource
    context: int
    training: Training
    limits: Limits
    wish: Wish
    speed: Speed
    run: PlannedRun | None

    @property
    def model(self) -> SplitModelPlan:
        """The planned model at the rank to plan."""
        return self.source.make(self.source.rank)

    @property
    def steps(self) -> int | None:
        """Optimizer steps; None where only the data would say."""
        return self.options.steps if self.run is None else self.run.total_steps

    @property
    def tasks(self) -> tuple[str, ...]:
        """What to plan; with DATA what `qsvd train` does, unless more is asked for."""
        if self.options.gpus is not None:
            return ()
        asked = self.options.estimate
        if asked not in ("auto", "all"):
            return (asked,)
        quantize = () if self.source.is_split else ("quantize",)
        serve = ("serve",) if self.model.generates and (asked == "all" or self.run is None) else ()
        return (*quantize, "train", *serve)


def prepare_plan(options: Plan, run: Train | None = None) -> PlanJob:
    """Read the config and refuse what cannot be planned.

    Args:
        run: The run that is planned, which may have begun already; None for a new one.
    """
    check(options)
    old = None if run is None else recorded(run.out.expanduser())
    here, notes = planned_machine(options)
    source = plan_source(options, here.dtype)
    check_pairs(options, source.make(source.rank).method)
    planned = None if options.data is None else _planned_run(train_of(options), source, here, old)
    context = context_length(source.make(source.rank).text_config, unlimited=2**20)
    tokens = options.max_length or min(MOST_LENGTH, context)
    if tokens > context:
        raise BadInput(f"--max-length {tokens} is above the context length of the model, {context}")
    is_labelled = options.task == "classification" if planned is None else bool(planned.data.train.label_names)
    wish = wish_of(options, old, is_labelled=is_labelled)
    if run is not None:
        wish = divided(wish, run)
    if options.gpus is not None and here.device.type != "cuda":
        raise BadInput(f"--gpus {options.gpus} needs the memory of a GPU, and there is none here: give --gpu 24GB")

    def without_data(way: Plan) -> Training:
        return replace(training_of(way, tokens, here.device), has_loss=not is_labelled)

    training = (
        planned.training
        if planned
        else without_data(with_batches(options, source.make(source.rank), without_data, tokens, wish, here))
    )
    return PlanJob(
        options=options,
        source=replace(source, notes=(*source.notes, *notes)),
        context=context,
        training=training if options.gpus is None else part_of(options, training, options.gpus),
        limits=here.limits,
        wish=wish,
        speed=_speed(options, here.device),
        run=planned,
    )


def train_of(options: Plan) -> Train:
    """Return the run of `qsvd train` that is planned."""
    shared = {field.name: getattr(options, field.name) for field in fields(TrainingOptions)}
    return Train(options.model, options.data or "DATA", Path("RUN"), **shared)


def _planned_run(options: Train, source: PlanSource, here: Machine, old: Recorded | None) -> PlannedRun:
    """Return a run on a quantized model, or on a 16-bit model that is quantized first."""
    if source.is_split:
        return prepare_run(options, here, must_fit=False, old=old)
    return run_of_16_bit(options, source, here, must_fit=False, old=old)


def run_of_16_bit(
    options: Train, source: PlanSource, here: Machine, *, must_fit: bool, old: Recorded | None
) -> PlannedRun:
    """Return a run on a 16-bit model that is quantized first; only its small files are read.

    Args:
        must_fit: Whether to raise a DoesNotFit if there is too little memory.
        old: What was chosen when the run began; None for a new run.
    """
    check_offload(options, here.device)
    model = source.make(source.rank)
    check_pairs(options, model.method)
    data = read_run_data(options, Home(str(options.base), small_files(options.base), source.architecture))
    return plan_run(options, model, data, here, must_fit=must_fit, old=old)


def plan_of(options: Train) -> Plan:
    """Return the plan of a run, which is what `qsvd train --dry-run` prints."""
    shared = {field.name: getattr(options, field.name) for field in fields(TrainingOptions)}
    return Plan(str(options.base), options.data, **shared)


def planned_machine(options: Plan) -> tuple[Machine, tuple[str, ...]]:
    """Return a GPU of the size --gpu, else this machine, and sentences on what is assumed.

    Without DATA, a machine that has no GPU plans for one without a limit.
    """
    has_gpu, is_cpu = torch.cuda.is_available(), options.device.startswith("cpu")
    if not is_cpu and (options.gpu is not None or (options.data is None and not has_gpu)):
        device = torch.device("cuda")
        free = free_host_memory() if has_gpu else None
        limits = Limits(
            gpu=None if options.gpu is None else parse_size(options.gpu, "--gpu"),
            host=free if options.host is None else parse_size(options.host, "--host"),
        )
        return Machine(device, dtype_of(options.dtype, device), limits), () if options.gpu else (NO_GPU,)
    device = device_of(options.device)
    return machine(device, dtype_of(options.dtype, device), gpu=options.gpu, host=options.host), ()


def plan_source(options: Plan, dtype: torch.dtype) -> PlanSource:
    """Read the config of a 16-bit model, or the record of a quantized one, to compute in a dtype."""
    folder = Path(options.model).expanduser()
    if (folder / MANIFEST).is_file():
        return _of_quantized(options, open_split(folder), dtype)
    config = read_config(folder if folder.exists() else download_config(options.model))
    return _of_config(options, config, adapter_options_of(options), dtype)


def _of_config(options: Plan, config: "PreTrainedConfig", adapter: AdapterOptions, dtype: torch.dtype) -> PlanSource:
    """Return a 16-bit model as qsvd quantize would store it."""
    if getattr(config, "quantization_config", None) is not None:
        raise BadInput(
            f"{options.model} is quantized already; give the 16-bit model, one in FP8 with block scales or MXFP4, or "
            "one that qsvd quantized"
        )
    stacks = unsplittable(config)
    names = plan_model(config, exclude=stacks, include_towers=options.include_towers)
    empty = skeleton(config, dtype)
    is_added = adapter.method is not None and not METHODS[adapter.method].needs_components
    is_plain = is_added and options.allocation is None
    tables = tables_of(names, options.head_bits, options.embedding_bits)
    allocation_of = _allocation_of(options, names.weights, tables)
    if options.allocation is not None and adapter.method is None:
        method = default_method(choice.rank for choice in allocation_of(0).choices.values())
        adapter = replace(adapter, method=method)
        is_added = not METHODS[method].needs_components

    def make(rank: int) -> SplitModelPlan:
        trained = replace(adapter, rank=(rank or None) if is_added else None)
        return replace(planned(empty, names, allocation_of(0 if is_plain else rank), options=trained), tables=tables)

    is_fixed = options.allocation is not None and not is_added
    most_rank = min(min(spec.shape) for spec in [s for s in names.weights if not s.stack] or names.weights)
    if options.budget is not None and not is_plain:
        most_rank = most_rank_within(names.weights, options.budget)
    if is_fixed:
        most_rank = max(choice.rank for choice in allocation_of(0).choices.values())
    default = (METHODS[adapter.method].defaults.rank if adapter.method else None) or Quantize.rank
    rank = min(default, most_rank) if options.rank is None else options.rank
    if rank > most_rank or (is_fixed and options.rank not in (None, most_rank)):
        why = "the shorter side of the smallest layer"
        if is_fixed or options.budget is not None:
            why = "the rank in --allocation" if is_fixed else f"the highest rank in --budget {options.budget}"
        raise BadInput(f"--rank {rank} is {'not' if is_fixed else 'above'} {most_rank}, {why}")
    notes = _notes(options, stacks, adapter.method if is_plain else None) + _share(names, tables, options.codec)
    chosen = most_rank if is_fixed else rank
    return PlanSource(make, chosen, most_rank, is_fixed, notes, names.architecture)


def _notes(options: Plan, stacks: Sequence[str], plain: str | None) -> tuple[str, ...]:
    """Return what to say of the plan; `plain` is the method where no components are stored."""
    notes = (f"{plain} is planned without stored components (rank 0), as in QLoRA.",) if plain else ()
    if stacks:
        notes += (f"{len(stacks)} layers cannot be quantized and are counted in 16 bits: {stacks[0]}, ...",)
    if options.budget is not None:
        notes += ("Only the total size of a budget is used here; qsvd allocate chooses bits per layer.",)
    if options.allocation is not None:
        notes += (f"Bits and rank of each layer are from {options.allocation}.",)
    return notes


def _share(names: ModelPlan, tables: Sequence[Table], codec: str) -> tuple[str, ...]:
    """Say how much of a model is quantized, and what makes it more, if it is less than MUCH."""
    share = coverage(replace(names, weights=(*names.weights, *tables))).share
    if share >= MUCH:
        return ()
    every: tuple[Table, ...] = ()
    for head_bits, embedding_bits in ((8, 8), (None, 8), (8, None)):
        with suppress(BadInput):  # it has none that can be quantized
            every = every or tables_of(names, head_bits, embedding_bits)
    known = {one.role for one in tables}
    more = [table.role for table in every if table.role not in known and codec == "nf4"]  # int4 leaves them
    said = f"{100 * share:.1f} % of the elements of the model are quantized"
    if not more:
        return (f"{said}; the rest stays in 16 bits.",)
    possible = coverage(replace(names, weights=(*names.weights, *every))).share
    return (f"{said}; with {' '.join(f'--{role}-bits 8' for role in more)} it is {100 * possible:.1f} %.",)


def _allocation_of(
    options: Plan, weights: Sequence[WeightSpec], tables: Sequence[Table]
) -> Callable[[int], Allocation]:
    """Return the function from a rank to an allocation: NF4, a mixture that fits the budget, or the given table."""
    if options.allocation is not None:
        table, _ = read_table(options.allocation, weights, tables)
        return lambda _: table
    budget = options.budget
    if budget is not None:
        return cache(partial(assumed, weights, budget))
    codec = usual_codec(weights, double_quant=options.double_quant, packed=bool(tables), name=options.codec)
    return lambda rank: uniform(weights, Choice(codec, rank), options.expert_rank)


def _of_quantized(options: Plan, split: SplitFolder, dtype: torch.dtype) -> PlanSource:
    """Return a quantized model with an adapter."""
    adapter, _ = starting_options(options, split)
    stored = max(split.ranks.values())
    record, model_of = new_record(split, replace(adapter, rank=None)), planner_of(split, dtype)
    kind = METHODS[record.method]
    is_fixed = not kind.takes_rank
    if is_fixed and adapter.rank not in (None, stored):
        raise BadInput(
            f"--rank {adapter.rank} is not {stored}, the stored rank, which {record.method} trains; leave --rank out"
        )

    default = kind.defaults.rank or stored

    def make(rank: int) -> SplitModelPlan:
        is_default = is_fixed or (adapter.rank is None and rank == default)
        trained = replace(adapter, method=record.method, rank=None if is_default else rank)
        return model_of(new_record(split, trained))

    rank = adapter.rank or default
    notes = (f"{split.folder} is quantized already: its stored ranks and formats are used.",)
    if not kind.needs_components:
        stored = min(min(weight["shape"]) for weight in split.weights.values())
    architecture = split.manifest["source"]["architecture"]
    return PlanSource(make, rank, stored, is_fixed, notes, architecture, is_split=True)


def _speed(options: Plan, device: torch.device) -> Speed:
    """Return the speeds that are given, else measured on the GPU of this machine, else assumed."""
    is_measured = torch.cuda.is_available() and device.type == "cuda"
    assumed_flops = GPU.flops if device.type == "cuda" else Rate(CPU_FLOPS * torch.get_num_threads())
    flops = Rate(measured_flops(), "measured") if is_measured and options.tflops is None else assumed_flops
    link = Rate(measured_link(), "measured") if is_measured and options.link is None else GPU.link
    return Speed(
        flops if options.tflops is None else Rate(1e12 * options.tflops, "given"),
        link if options.link is None else Rate(1e9 * options.link, "given"),
        GPU.disk if options.disk is None else Rate(1e9 * options.disk, "given"),
    )
