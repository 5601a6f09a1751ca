"""What `qsvd plan` counts, and against what: everything that can be refused before it counts."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qsvd.adapters.adapter import AdapterOptions
from qsvd.adapters.planned import planned, planner_of
from qsvd.adapters.start import new_record
from qsvd.checkpoint.host_memory import free_host_memory
from qsvd.checkpoint.hub import download_config
from qsvd.checkpoint.read import read_config
from qsvd.checkpoint.read_split import SplitFolder, open_split
from qsvd.checkpoint.write import MANIFEST
from qsvd.commands.measure_speed import measured_flops, measured_link
from qsvd.numerics.normal_float import NormalFloat4
from qsvd.options import Plan
from qsvd.plan.activations import Batch
from qsvd.plan.allocation import Choice, uniform
from qsvd.plan.duration import Rate, Speed
from qsvd.plan.memory import Limits
from qsvd.plan.model import plan_model, unsplittable
from qsvd.plan.placement import Wish
from qsvd.plan.sizes import parse_size
from qsvd.plan.split_model import SplitModelPlan, skeleton
from qsvd.plan.training import Training

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MOST_TOKENS = 2048  # of a sequence, unless more are asked for
RANK = 64  # where nothing is stored and none is given
FLOPS, LINK, DISK = 1e14, 25e9, 3e9  # assumed: operations and bytes a second, of a card on PCIe 4 and an NVMe disk
DTYPE = torch.bfloat16  # to compute in, on a GPU


@dataclass(frozen=True)
class PlanJob:
    """A checked question.

    Args:
        make: The split model at a rank.
        rank: As asked for; of a result of `qsvd quantize`, of what is trained.
        most_rank: That a split can have.
        context: Tokens that the model can read, as far as its config says.
        notes: About the model, a sentence each.
        is_split: Whether the model is a result of `qsvd quantize` already.
    """

    options: Plan
    make: Callable[[int], SplitModelPlan]
    rank: int
    most_rank: int
    context: int
    training: Training
    limits: Limits
    wish: Wish
    speed: Speed
    notes: tuple[str, ...]
    is_split: bool = False

    @property
    def model(self) -> SplitModelPlan:
        return self.make(self.rank)


def prepare_plan(options: Plan) -> PlanJob:
    """Read the config, and refuse what cannot be planned.

    Raises:
        ValueError: an option is not usable, or the model is none that can be split.
    """
    _check_numbers(options)
    limits = _limits(options)
    adapter = AdapterOptions(None if options.method == "auto" else options.method, dtype=options.adapter_dtype)
    folder = Path(options.model).expanduser()
    if (folder / MANIFEST).is_file():
        return _of_split(options, open_split(folder), limits, adapter)
    return _of_config(options, _config(options.model, folder), limits, adapter)


def _config(model: str, path: Path) -> "PreTrainedConfig":
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise ValueError(f"no config.json in {path.parent}; give a transformers checkpoint or a config.json")
    elif not path.is_file():
        path = download_config(model)
    return read_config(path)


def _of_config(options: Plan, config: "PreTrainedConfig", limits: Limits, adapter: AdapterOptions) -> PlanJob:
    """A model that is still in 16 bits."""
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{options.model} is quantized already; give the 16-bit model, or a result of qsvd quantize")
    stacks = unsplittable(config)
    names = plan_model(config, exclude=stacks)
    empty = skeleton(config, DTYPE)
    codec = NormalFloat4(double_quant=options.double_quant)
    is_plain = adapter.method == "lora"

    def make(rank: int) -> SplitModelPlan:
        allocation = uniform(names.weights, Choice(codec, 0 if is_plain else rank))
        trained = AdapterOptions(adapter.method, rank or None, None, adapter.dtype) if is_plain else adapter
        return planned(empty, names, allocation, options=trained)

    notes = ("lora is counted on the residual alone (rank 0), as QLoRA does.",) if is_plain else ()
    if stacks:
        notes += (f"{len(stacks)} weights of the blocks cannot be split and are counted in 16 bits: {stacks[0]}, ...",)
    least = min(min(spec.shape) for spec in names.weights)
    return _job(options, make, limits, min(RANK, least) if options.rank is None else options.rank, notes=notes)


def _of_split(options: Plan, split: SplitFolder, limits: Limits, adapter: AdapterOptions) -> PlanJob:
    """A result of `qsvd quantize`."""
    stored = max(weight["rank"] for weight in split.weights.values())
    record, model_of = new_record(split, adapter), planner_of(split, DTYPE)
    is_fixed = record.method == "pissa"
    if is_fixed and options.rank not in (None, stored):
        raise ValueError(f"--rank {options.rank} is not the stored rank {stored}, which pissa trains: leave it out")

    def make(rank: int) -> SplitModelPlan:
        trained = AdapterOptions(record.method, None if is_fixed else rank, None, adapter.dtype)
        return model_of(new_record(split, trained))

    rank = options.rank or (RANK if record.method == "lora" else stored)
    notes = (f"{split.folder} is split already: its stored ranks and its quantization count.",)
    job = replace(_job(options, make, limits, rank, notes=notes), is_split=True)
    return job if record.method == "lora" else replace(job, most_rank=stored)


def _job(
    options: Plan, make: Callable[[int], SplitModelPlan], limits: Limits, rank: int, *, notes: tuple[str, ...]
) -> PlanJob:
    model = make(rank)
    most_rank = min(min(spec.shape) for spec in model.names.weights)
    if rank > most_rank:
        raise ValueError(f"--rank {rank} is above {most_rank}, the shorter side of the smallest weight")
    context = getattr(model.text_config, "max_position_embeddings", None) or 2**20
    tokens = min(MOST_TOKENS, context) if options.tokens is None else options.tokens
    if tokens > context:
        raise ValueError(f"--tokens {tokens} is above the {context} positions of the model")
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
        make=make,
        rank=rank,
        most_rank=most_rank,
        context=context,
        training=Training(batch, options.accumulate, optimizer, options.layer_major),
        limits=limits,
        wish=Wish(options.resident),
        speed=_speed(options),
        notes=notes,
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
    gpu = torch.cuda.get_device_properties(0).total_memory if has_gpu else None
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
        raise ValueError("; ".join(wrong))
