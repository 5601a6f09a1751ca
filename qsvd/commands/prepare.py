"""Everything that can be known, checked and refused before a weight is read."""

import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qsvd.checkpoint.check import check_complete, check_not_quantized
from qsvd.checkpoint.read import Checkpoint, open_checkpoint
from qsvd.checkpoint.shards import Shard, Sizes, plan_shards, sizes_of
from qsvd.checkpoint.tensor_file import TORCH_DTYPES
from qsvd.checkpoint.write import MANIFEST
from qsvd.commands.device import device_of
from qsvd.commands.failures import DoesNotFit
from qsvd.commands.place_run import machine
from qsvd.decompose.alternate import Recipe
from qsvd.numerics.normal_float import NormalFloat4
from qsvd.options import Quantize
from qsvd.plan.listing import listing
from qsvd.plan.model import ModelPlan, WeightSpec, coverage, plan_model
from qsvd.plan.quantizing import plan_splitting
from qsvd.plan.sizes import parse_size
from qsvd.report.header import Header
from qsvd.report.planning import lack

LEAST_SHARD = 10**5  # bytes of one output file
HEADS = ("lm_head", "classifier", "score", "qa_outputs")  # trained anew on a split base, so never 4-bit


@dataclass(frozen=True)
class Job:
    """A checked run of `qsvd quantize`."""

    options: Quantize
    checkpoint: Checkpoint
    plan: ModelPlan
    recipe: Recipe
    codec: NormalFloat4
    shards: tuple[Shard, ...]
    sizes: Sizes
    device: torch.device
    compute_dtype: torch.dtype
    skipped: tuple[str, ...]

    @property
    def out(self) -> Path:
        """The folder of the result."""
        return self.options.out.expanduser()

    @property
    def header(self) -> Header:
        """The head of the reports."""
        options = self.options
        return Header(
            model=options.model,
            codec=f"{self.codec.name}+dq" if self.codec.double_quant else self.codec.name,
            rank=options.rank,
            order=options.order,
            iterations=options.iterations,
            end=options.end,
            coverage=coverage(self.plan),
        )

    @property
    def identity(self) -> dict[str, Any]:
        """What the bytes of the result depend on."""
        options = asdict(self.options)
        for name in ("out", "dry_run", "model"):
            del options[name]
        options |= {name: list(options[name]) for name in ("include", "exclude")}
        options["shard_size"] = parse_size(self.options.shard_size, "--shard-size", least=LEAST_SHARD)
        return options | {"device": self.device.type, "source_fingerprint": self.checkpoint.fingerprint}


def prepare(options: Quantize, checkpoint: Checkpoint | None = None) -> Job:
    """Open the checkpoint, plan the work, and refuse what cannot be done.

    Args:
        checkpoint: An open one; None opens options.model.

    Raises:
        ValueError: an option, or the checkpoint, is not usable.
    """
    codec = NormalFloat4(double_quant=options.double_quant)
    recipe = Recipe(
        codec=codec,
        rank=options.rank,
        iterations=options.iterations,
        order=options.order,
        end=options.end,
        stop=options.stop,
        exact=options.svd == "exact",
        dtype=getattr(torch, options.dtype),
    )
    most_bytes, device = parse_size(options.shard_size, "--shard-size", least=LEAST_SHARD), device_of(options.device)
    checkpoint = checkpoint or open_checkpoint(options.model)
    check_not_quantized(checkpoint.config, checkpoint.tensors)
    plan = plan_model(checkpoint.config, include=options.include, exclude=options.exclude)
    plan = check_complete(checkpoint, plan)
    _check_rank(options.rank, plan.weights)
    shards = plan_shards(checkpoint, plan.weights, codec, most_bytes)
    return Job(
        options=options,
        checkpoint=checkpoint,
        plan=plan,
        recipe=recipe,
        codec=codec,
        shards=tuple(shards),
        sizes=sizes_of(checkpoint, plan.weights, shards, options.rank, recipe.dtype),
        device=device,
        compute_dtype=_compute_dtype(checkpoint, plan.weights),
        skipped=_skipped(plan),
    )


def check_memory(job: Job) -> None:
    """Refuse a run whose largest weight cannot be split in the memory that is free.

    Raises:
        DoesNotFit: with the numbers.
    """
    if not job.plan.weights or (job.out / MANIFEST).is_file():
        return
    largest = max(job.plan.weights, key=lambda spec: math.prod(spec.shape))
    free = machine(job.device, job.compute_dtype).limits
    plan = plan_splitting(largest.shape, job.options.rank, job.codec, job.device.type, free)
    if not plan.fits:
        raise DoesNotFit(
            f"{lack(plan)} to split {largest.name} {list(largest.shape)}; close what else uses it, take another "
            "--device, or --exclude the weight"
        )


def check_disk(job: Job) -> None:
    """Refuse a run whose output cannot fit on the disk; a complete result needs no more.

    Raises:
        DoesNotFit: too little space is free, with the numbers.
    """
    if (job.out / MANIFEST).is_file():
        return
    folder = job.out.absolute()
    written = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0
    while not folder.exists():
        folder = folder.parent
    needed, free = job.sizes.disk - written, shutil.disk_usage(folder).free
    if needed > free:
        raise DoesNotFit(
            f"{job.options.out} needs {needed / 1e9:.2f} GB more disk space ({folder} has {free / 1e9:.2f} GB free); "
            "free some, or give --out another disk, a lower --rank or a smaller --shard-size"
        )


def _check_rank(rank: int, weights: Sequence[WeightSpec]) -> None:
    small = [f"{spec.module} {list(spec.shape)}" for spec in weights if min(spec.shape) < rank]
    if small:
        limit = min(min(spec.shape) for spec in weights)
        raise ValueError(
            f"--rank {rank} is above the shorter side of {len(small)} weights: {listing(small)}; "
            f"give at most {limit}, or --exclude them"
        )


def _compute_dtype(checkpoint: Checkpoint, weights: Sequence[WeightSpec]) -> torch.dtype:
    """The dtype that most elements are stored in: what a loader decodes to."""
    elements: dict[str, int] = {}
    for spec in weights:
        entry = checkpoint.tensors[spec.name]
        elements[entry.dtype] = elements.get(entry.dtype, 0) + spec.shape[0] * spec.shape[1]
    return TORCH_DTYPES[max(elements, key=lambda name: elements[name])]


def _skipped(plan: ModelPlan) -> tuple[str, ...]:
    """What transformers must not make 4-bit: every linear layer that is left, and heads that a user may add.

    Raises:
        ValueError: transformers' matching would also skip a weight that is split, or convert one that is left.
    """
    from transformers.quantizers.quantizers_utils import should_convert_module

    split = [spec.module for spec in plan.weights]
    heads = [head for head in HEADS if all(should_convert_module(path, [head]) for path in split)]
    skipped = list(dict.fromkeys((*plan.left_linears, *heads)))
    wrong = [path for path in split if not should_convert_module(path, skipped)]
    if wrong:
        raise ValueError(
            f"transformers cannot tell {listing(wrong)} from the layers left in 16 bits, since it compares the ends of "
            "names; exclude these too, or include the others"
        )
    return tuple(skipped)
