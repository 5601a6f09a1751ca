"""A run of `qsvd quantize` that is settled: what every weight gets, which file holds it, how much it all takes."""

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from qsvd.checkpoint.shards import Shard, Sizes, plan_shards, sizes_of
from qsvd.checkpoint.write import MANIFEST
from qsvd.commands.failures import DoesNotFit
from qsvd.commands.place_run import machine
from qsvd.commands.prepare import Source, Table
from qsvd.decompose.alternate import Recipe
from qsvd.plan.allocation import Allocation, Choice, residual_bits, uniform
from qsvd.plan.listing import listing
from qsvd.plan.model import ModelPlan, coverage
from qsvd.plan.quantizing import plan_splitting
from qsvd.report.header import Header, codec_words
from qsvd.report.planning import lack

ALLOCATION = "allocation.txt"  # in the folder of the result
HEADS = ("lm_head", "classifier", "score", "qa_outputs")  # trained anew on a split base, so never 4-bit


@dataclass(frozen=True)
class Job:
    """A request with an allocation.

    Args:
        text: Of the table that says the allocation.
        recipes: By the path of the module.
        skipped: What transformers must not make 4-bit, where it is bitsandbytes that does.
    """

    source: Source
    allocation: Allocation
    text: str | None
    recipes: Mapping[str, Recipe]
    shards: tuple[Shard, ...]
    sizes: Sizes
    skipped: tuple[str, ...]

    @property
    def header(self) -> Header:
        """The head of the reports."""
        options, weights = self.source.options, self.source.plan.weights
        choices = self.allocation.choices
        ranks = [choice.rank for choice in choices.values()]
        codecs = [choice.codec for choice in choices.values()]
        return Header(
            model=options.model,
            codec=codec_words(codecs),
            rank=max(ranks),
            order=options.order,
            iterations=options.iterations,
            end=options.end,
            coverage=coverage(self.source.plan),
            least_rank=min(ranks),
            residual_bits=None if self.allocation.is_plain else residual_bits(self.allocation, weights),
            quantizer="bitsandbytes" if self.allocation.is_plain else "qsvd",
            objective="fisher" if options.objective == "fisher" else "plain",
        )


def job_of(source: Source, table: Table | None) -> Job:
    """The job of a request.

    Args:
        table: What every weight gets; None is the codec and the rank of the request.

    Raises:
        ValueError: transformers could not tell the weights that are split from others.
    """
    choice = Choice(source.recipe.codec, source.recipe.rank)
    allocation = table.allocation if table else uniform(source.plan.weights, choice)
    checkpoint, weights, dtype = source.checkpoint, source.plan.weights, source.recipe.dtype
    shards = plan_shards(checkpoint, weights, allocation, source.shard_bytes)
    return Job(
        source=source,
        allocation=allocation,
        text=table.text if table else None,
        recipes={
            module: replace(source.recipe, codec=choice.codec, rank=choice.rank)
            for module, choice in allocation.choices.items()
        },
        shards=tuple(shards),
        sizes=sizes_of(checkpoint, weights, shards, allocation, dtype),
        skipped=_skipped(source.plan) if allocation.is_plain else (),
    )


def check_memory(job: Job) -> None:
    """Refuse a run whose largest weight cannot be split in the memory that is free.

    Raises:
        DoesNotFit: with the numbers.
    """
    source = job.source
    if (source.out / MANIFEST).is_file():
        return
    largest = max(source.plan.weights, key=lambda spec: math.prod(spec.shape))
    free = machine(source.device, source.compute_dtype).limits
    choice = job.allocation.choices[largest.module]
    weighted = source.options.objective == "fisher"
    plan = plan_splitting(largest.shape, choice, source.device.type, free, weighted=weighted)
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
    check_room(job.source.out, job.sizes.disk)


def check_room(out: Path, num_bytes: int) -> None:
    """Refuse, by DoesNotFit, so many bytes in a folder that is not complete, those counted that are there."""
    if (out / MANIFEST).is_file():
        return
    folder = out.absolute()
    written = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0
    while not folder.exists():
        folder = folder.parent
    needed, free = num_bytes - written, shutil.disk_usage(folder).free
    if needed > free:
        raise DoesNotFit(
            f"{out} needs {needed / 1e9:.2f} GB more disk space ({folder} has {free / 1e9:.2f} GB free); "
            "free some, or give --out another disk, a lower --rank or --budget, or a smaller --shard-size"
        )


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
