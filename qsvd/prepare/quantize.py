"""Everything that can be known, checked and refused before a weight is read."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qsvd.decompose.alternate import Recipe
from qsvd.decompose.objective import PLAIN, Objective
from qsvd.errors import BadInput, DoesNotFit, listing, parse_size
from qsvd.files.atomic import file_sha256, write_text
from qsvd.files.check import check_complete, check_not_quantized
from qsvd.files.output import OutputFolder
from qsvd.files.safetensors import TORCH_DTYPES
from qsvd.files.shards import Shard, Sizes, plan_shards, sizes_of
from qsvd.files.source import Checkpoint, open_checkpoint
from qsvd.files.statistics import Statistics, statistics_for
from qsvd.files.workspace import MANIFEST, UNFINISHED, check_space
from qsvd.memory.device import device_of
from qsvd.memory.other_tasks import plan_splitting
from qsvd.numerics.names import spelling
from qsvd.numerics.nf4 import NormalFloat4
from qsvd.options import Allocate, Quantize
from qsvd.plan.allocation import Allocation, Choice, from_text, residual_bits, to_text, uniform
from qsvd.plan.weights import ModelPlan, WeightSpec, coverage, plan_model
from qsvd.prepare.allocate import Progressed, ShowProgress, execute, is_sealed, prepare_allocate, sealed
from qsvd.prepare.machine import machine
from qsvd.report.header import ReportHeader, codec_words
from qsvd.report.planning import lack

LEAST_SHARD = 10**5  # bytes of one output file


@dataclass(frozen=True)
class Table:
    """An allocation, and the text that says it."""

    allocation: Allocation
    text: str


@dataclass(frozen=True)
class Source:
    """A checked request: what is to be split, and how; with a budget not yet to how many bits and components.

    Args:
        recipe: Of the loop; codec and rank are those of every weight where there is neither table nor budget.
        table: That the options name.
        statistics: Where the objective asks for them.
        shard_bytes: Most of one output file.
    """

    options: Quantize
    checkpoint: Checkpoint
    plan: ModelPlan
    recipe: Recipe
    table: Table | None
    statistics: Statistics | None
    device: torch.device
    compute_dtype: torch.dtype
    shard_bytes: int

    @property
    def out(self) -> Path:
        """The folder of the result."""
        return self.options.out.expanduser()

    @property
    def identity(self) -> dict[str, Any]:
        """What the bytes of the result depend on."""
        options = asdict(self.options)
        for name in ("out", "dry_run", "model", "allocation", "statistics"):
            del options[name]
        if self.options.budget is None:
            del options["budget"], options["allocator"]
            if self.statistics is None:
                del options["objective"]
        if self.statistics is not None:
            options["statistics"] = file_sha256(self.statistics.path)
        options |= {name: list(options[name]) for name in ("include", "exclude")}
        options["shard_size"] = self.shard_bytes
        if self.table is not None:
            choices = self.table.allocation.choices
            options["allocation"] = {m: [spelling(choice.codec), choice.rank] for m, choice in choices.items()}
        return options | {"device": self.device.type, "source_fingerprint": self.checkpoint.fingerprint}

    def objective(self, module: str) -> Objective:
        """What the split of a weight is to minimise; a ValueError where its statistics are damaged."""
        if self.statistics is None or self.options.objective != "fisher":
            return PLAIN
        return self.statistics.objective(module)


def prepare_source(options: Quantize, checkpoint: Checkpoint | None = None) -> Source:
    """Open the checkpoint, name its weights, and refuse what cannot be done.

    Args:
        checkpoint: An open one; None opens options.model.

    Raises:
        BadInput: an option, or the checkpoint, is not usable.
    """
    recipe = Recipe(
        codec=NormalFloat4(double_quant=options.double_quant),
        rank=options.rank if options.budget is None and options.allocation is None else 1,  # of any that has factors
        iterations=options.iterations,
        order=options.order,
        end=options.end,
        stop=options.stop,
        exact=options.svd == "exact",
        dtype=getattr(torch, options.dtype),
    )
    _check_choices(options)
    shard_bytes = parse_size(options.shard_size, "--shard-size", least=LEAST_SHARD)
    device = device_of(options.device)
    checkpoint = checkpoint or open_checkpoint(options.model)
    check_not_quantized(checkpoint.config, checkpoint.tensors)
    plan = plan_model(checkpoint.config, include=options.include, exclude=options.exclude)
    plan = check_complete(checkpoint, plan)
    if options.allocation is None and options.budget is None:
        _check_rank(options.rank, plan.weights)
    return Source(
        options=options,
        checkpoint=checkpoint,
        plan=plan,
        recipe=recipe,
        table=None if options.allocation is None else read_table(options.allocation, plan.weights),
        statistics=statistics_for(options.objective, options.statistics, checkpoint, plan.weights),
        device=device,
        compute_dtype=_compute_dtype(checkpoint, plan.weights),
        shard_bytes=shard_bytes,
    )


def read_table(file: Path, weights: Sequence[WeightSpec]) -> Table:
    """The choices of a table that `qsvd allocate` wrote, or somebody edited.

    Raises:
        BadInput: it cannot be read, or does not fit the weights.
    """
    try:
        text = file.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--allocation {file} cannot be read as a text file: {error}") from error
    return Table(from_text(text, weights, f"--allocation {file}"), text)


def _check_choices(options: Quantize) -> None:
    """Refuse options that say different things about bits and ranks."""
    if options.allocation is not None and options.budget is not None:
        raise BadInput("--budget and --allocation: one of them says how many bits a weight gets; leave one out")
    if options.budget is not None and options.dry_run:
        raise BadInput(
            "--dry-run cannot show what a budget leads to before the weights are measured; qsvd allocate measures "
            "them, and qsvd plan --budget says the bytes"
        )
    if options.allocator != "both" and options.budget is None:
        raise BadInput(f"--allocator {options.allocator} spends a --budget, and none is given; add one")
    if options.objective == "hessian" and options.budget is None:
        raise BadInput("--objective hessian weights whole matrices, so it matters with --budget only; add one")


def _check_rank(rank: int, weights: Sequence[WeightSpec]) -> None:
    small = [f"{spec.module} {list(spec.shape)}" for spec in weights if min(spec.shape) < rank]
    if small:
        limit = min(min(spec.shape) for spec in weights)
        raise BadInput(
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


# A run of `qsvd quantize` that is settled: what every weight gets, which file holds it, how much it all takes.


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
    def header(self) -> ReportHeader:
        """The head of the reports."""
        options, weights = self.source.options, self.source.plan.weights
        choices = self.allocation.choices
        ranks = [choice.rank for choice in choices.values()]
        codecs = [choice.codec for choice in choices.values()]
        return ReportHeader(
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
        BadInput: transformers could not tell the weights that are split from others.
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
    otherwise = "give --out another disk, a lower --rank or --budget, or a smaller --shard-size"
    check_space(out, num_bytes, otherwise)


def _skipped(plan: ModelPlan) -> tuple[str, ...]:
    """What transformers must not make 4-bit: every linear layer that is left, and heads that a user may add.

    Raises:
        BadInput: transformers' matching would also skip a weight that is split, or convert one that is left.
    """
    from transformers.quantizers.quantizers_utils import should_convert_module

    split = [spec.module for spec in plan.weights]
    heads = [head for head in HEADS if all(should_convert_module(path, [head]) for path in split)]
    skipped = list(dict.fromkeys((*plan.left_linears, *heads)))
    wrong = [path for path in split if not should_convert_module(path, skipped)]
    if wrong:
        raise BadInput(
            f"transformers cannot tell {listing(wrong)} from the layers left in 16 bits, since it compares the ends of "
            "names; exclude these too, or include the others"
        )
    return tuple(skipped)


# From a request of `qsvd quantize` to a job: what every weight gets, by a budget, a table, or alike for all.


def prepare(options: Quantize, checkpoint: Checkpoint | None = None) -> Job:
    """A job, silently; with a budget that takes a pass over all weights, and writes to the folder of the result.

    Args:
        checkpoint: An open one; None opens options.model.

    Raises:
        BadInput, DoesNotFit: as from `prepare_source` and `settled`.
    """
    return settled(prepare_source(options, checkpoint), _silent)


def settled(source: Source, show: ShowProgress) -> Job:
    """The job of a request.

    With a budget the weights are measured first. Measurements, and the table that comes of them, stay in the folder of
    the result: a run that was stopped goes on with the same table.

    Args:
        show: Is told after every measured weight; what it raises ends the work, and measured weights stay.

    Raises:
        BadInput: the budget, or the folder, is not usable.
        DoesNotFit: the largest weight cannot be measured in the memory that is free.
    """
    if source.options.budget is None:
        return job_of(source, source.table)
    unfinished = source.out / UNFINISHED / ALLOCATION
    job = None
    if not unfinished.is_file() and not (source.out / MANIFEST).is_file():
        job = prepare_allocate(_questions(source, unfinished), source.checkpoint, source.plan)
        check_room(source.out, _most_bytes(source, job.task.budget.num_bytes))  # both before the folder is made
    with OutputFolder(source.out, source.identity) as folder:
        kept = source.out / ALLOCATION if folder.is_complete else unfinished
        if job is not None and not folder.is_complete:
            allocation = execute(job, show).allocation
            write_text(kept, sealed(to_text(allocation, source.plan.weights, source.recipe.dtype.itemsize)))
        text = kept.read_text(encoding="utf-8")
        if not folder.is_complete and not is_sealed(text):
            raise BadInput(
                f"{kept} was edited, and weights may be split already by what it said; copy it, and give it as "
                "--allocation with another --out"
            )
    return job_of(source, Table(from_text(text, source.plan.weights, str(kept)), text))


def _most_bytes(source: Source, budget: int) -> int:
    """On the disk at any moment: all of the budget there twice at worst, and what is copied."""
    split = {spec.name for spec in source.plan.weights}
    return 2 * budget + sum(t.num_bytes for name, t in source.checkpoint.tensors.items() if name not in split)


def _questions(source: Source, file: Path) -> Allocate:
    """What `qsvd allocate` would have been asked."""
    options = source.options
    assert options.budget is not None, "the caller looked"
    return Allocate(
        options.model,
        budget=options.budget,
        out=file,
        allocator=options.allocator,
        objective=options.objective,
        statistics=options.statistics,
        rank=options.rank,
        dtype=options.dtype,
        device=options.device,
        seed=options.seed,
    )


def _silent(done: Progressed) -> None:
    del done
