"""Options of `qsvd allocate` to a checked run, and its work: measure the weights, then solve the budget."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qsvd.calibrate.block_walk import BlockWalk
from qsvd.calibrate.sums import Example
from qsvd.decompose.alternate import Recipe
from qsvd.decompose.candidates import PASSES, CandidateErrors, measure_candidates
from qsvd.decompose.moments import Moments
from qsvd.decompose.objective import PLAIN, Objective
from qsvd.errors import BadInput, DoesNotFit
from qsvd.files.atomic import file_sha256
from qsvd.files.check import check_finite
from qsvd.files.readers import stream
from qsvd.files.source import Checkpoint
from qsvd.files.statistics import CostsFile, Statistics, statistics_for
from qsvd.memory.device import device_of
from qsvd.numerics.names import codec_named
from qsvd.options import Allocate, Quantize
from qsvd.plan.allocation import TITLE, Allocation, Table, from_text, mixing_problems, with_tables
from qsvd.plan.budget import parse_budget
from qsvd.plan.grid import grid_of
from qsvd.plan.solve import AllocationProblem, AllocationResult, check_feasible, over_norms, solve
from qsvd.plan.weights import ModelPlan, WeightSpec
from qsvd.prepare.calibrate import tokens_digest
from qsvd.prepare.check_options import check
from qsvd.prepare.machine import machine, seed_of
from qsvd.prepare.models import open_16_bit
from qsvd.prepare.quantizing.calibration import open_walk, streamed, texts_of
from qsvd.records import Progress, ShowProgress
from qsvd.report.allocation import summary

EXPERTS_MEASURED = 4  # of a stack, for a budget: all get the same codec and rank
COPY_BYTES = 24  # per number: the weight in float32, three copies of it, and two weights as they are stored
DIGEST = "# digest: "  # of all other lines, so that an edited table is recognized


@dataclass(frozen=True)
class AllocateRun:
    """A checked run of `qsvd allocate`, or the part of `qsvd quantize --budget` that does the same.

    Args:
        out: The table. Measurements are kept next to it.
        examples: The texts of --calibrate.
        cut: A sentence on texts that were cut, or empty.
    """

    options: Allocate | Quantize
    checkpoint: Checkpoint
    plan: ModelPlan
    task: AllocationProblem
    statistics: Statistics | None
    device: torch.device
    out: Path
    examples: tuple[Example, ...] = ()
    cut: str = ""

    @property
    def costs(self) -> Path:
        """The file that keeps the measurements."""
        return self.out.with_name(f"{self.out.name}.costs.jsonl")

    @property
    def is_fisher(self) -> bool:
        """Whether rows and columns are weighted while candidates are measured."""
        return self.options.objective == "fisher"

    @property
    def how(self) -> dict[str, Any]:
        """What `qsvd quantize` changes of a Recipe."""
        options = self.options
        if isinstance(options, Quantize):
            return {"scales": options.scales, "rounding": options.rounding}
        return {} if options.calibrate is None else {"scales": "mse", "rounding": "feedback"}

    @property
    def compares_layers(self) -> bool:
        """Whether errors of layers are compared as they are: with gradients they are changes of the loss."""
        return self.options.sensitivity == "both"

    def objective(self, spec: WeightSpec) -> Objective:
        """Return how the errors of a weight are weighted by statistics."""
        return self.statistics.objective(spec.module) if self.is_fisher and self.statistics else PLAIN

    def open_walk(self, show: ShowProgress) -> BlockWalk:
        """Return the walk over the blocks that gives the moments of --calibrate; see `open_walk` of calibration.py."""
        model, tell = streamed(self.checkpoint, self.plan, self.device), partial(tell_measuring, show)
        return open_walk(self.options, self.examples, model, tell, folder=self.out.parent)

    @property
    def identity(self) -> dict[str, Any]:
        """Return what the measurements depend on. The Hessian weights whole matrices, after they are measured; what
        `qsvd quantize` changes is in the identity of its folder."""
        options, grid = self.options, self.task.grid
        fisher = self.statistics if self.is_fisher else None
        texts = {"sensitivity": options.sensitivity, "tokens_sha256": tokens_digest(self.examples)} | self.how
        is_alone = isinstance(options, Allocate) and bool(self.examples)
        return (texts if is_alone else {}) | {
            "source_fingerprint": self.checkpoint.fingerprint,
            "codecs": list(grid.codecs),
            "ranks": None if grid.ranks is None else list(grid.ranks),
            "passes": PASSES,
            "statistics": None if fisher is None else file_sha256(fisher.path),
            "dtype": options.dtype,
            "device": self.device.type,
            "seed": options.seed,
        }


def prepare_allocate(options: Allocate, checkpoint: Checkpoint | None = None) -> AllocateRun:
    """Open what is needed, and refuse what cannot be done.

    Args:
        checkpoint: An open one; None opens options.model.
    """
    check(options, is_open=checkpoint is not None)
    device = device_of(options.device)
    checkpoint, plan = open_16_bit(options, checkpoint)
    statistics = statistics_for(options.objective, options.statistics, checkpoint, plan.weights)
    if options.calibrate is not None:
        options = replace(options, sensitivity=options.sensitivity or "both")
    examples, cut = texts_of(options, checkpoint, plan)
    run = allocate_run(options, checkpoint, plan, statistics, device, options.out.expanduser())
    run = replace(run, examples=examples, cut=cut)
    check_replaceable(run)
    check_measuring(run)
    if not run.costs.exists():
        check_finite(checkpoint, plan)
    return run


def allocate_run(
    options: Allocate | Quantize,
    checkpoint: Checkpoint,
    plan: ModelPlan,
    statistics: Statistics | None,
    device: torch.device,
    out: Path,
) -> AllocateRun:
    """Return the run that spends a budget on the weights of an open model; a BadInput where it cannot be met."""
    assert options.budget is not None, "asked for by the caller"
    chosen = options if isinstance(options, Allocate) else Allocate  # `qsvd quantize` leaves these at their defaults
    task = AllocationProblem(
        weights=plan.weights,
        grid=grid_of(chosen.codecs, chosen.ranks, options.rank, plan.weights),
        budget=parse_budget(options.budget, plan.weights),
        factor_bytes=getattr(torch, options.dtype).itemsize,
        count=chosen.count,
        gap=chosen.gap,
        time_limit=chosen.time_limit,
    )
    check_feasible(task, options.allocator)
    return AllocateRun(options, checkpoint, plan, task, statistics, device, out)


def sealed(text: str) -> str:
    """Return a table with a digest of its lines, by which an edited table is recognized."""
    title, rest = text.split("\n", maxsplit=1)
    return f"{title}\n{DIGEST}{_digest(text)}\n{rest}"


def is_sealed(text: str) -> bool:
    """Return whether a table is as `sealed` returned it."""
    lines = text.split("\n")
    digests = [line for line in lines if line.startswith(DIGEST)]
    rest = "\n".join(line for line in lines if not line.startswith(DIGEST))
    return digests == [f"{DIGEST}{_digest(rest)}"]


def importances(run: AllocateRun) -> tuple[Mapping[str, float] | None, tuple[str, ...]]:
    """Return the factor of each weight's squared error, None for 1, and remarks on the factors.

    HAWQ-V3's (arXiv:2011.10680): the mean of the Hessian's trace over the numbers of the weight. A Hessian estimated
    from few examples can have a trace of zero or less; the smallest trace above zero replaces it.

    Raises:
        BadInput: no trace is above zero.
    """
    if run.options.objective != "hessian":
        return None, ()
    assert run.statistics is not None, "checked before"
    means = {spec.module: run.statistics.trace(spec.module) / math.prod(spec.shape) for spec in run.task.weights}
    above = [mean for mean in means.values() if mean > 0]
    if not above:
        raise BadInput(f"{run.statistics.path} has no trace above zero; run qsvd calibrate with more --traces")
    raised = len(means) - len(above)
    remark = (f"traces: {raised} of {len(means)} are not above zero and count as the least that is",) if raised else ()
    return {module: max(mean, min(above)) for module, mean in means.items()}, remark


def check_replaceable(run: AllocateRun) -> None:
    """Refuse to overwrite a file that is not an unedited table of the same model."""
    path, fingerprint = run.out, run.checkpoint.fingerprint
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    if not text.startswith(TITLE):
        raise BadInput(f"--out {path} exists and is not a table of qsvd allocate; give another name")
    if not is_sealed(text):
        raise BadInput(f"--out {path} was edited by hand; give another name, or move it away")
    if f"# source: {fingerprint}\n" not in text:
        raise BadInput(f"--out {path} is the table of another model; give another name")


def check_measuring(run: AllocateRun) -> None:
    """Refuse, by DoesNotFit, a run whose largest weight cannot be measured in the memory that is free."""
    largest = max(run.task.weights, key=lambda spec: math.prod(spec.shape))
    needed = COPY_BYTES * math.prod(largest.shape)
    limits = machine(run.device, torch.float32).limits
    free = limits.gpu if run.device.type == "cuda" else limits.host
    if free is not None and needed > free:
        raise DoesNotFit(
            f"{largest.name} {list(largest.shape)} needs about {needed / 1e9:.1f} GB on {run.device} to be measured, "
            f"and {free / 1e9:.1f} GB are free; close other programs that use it, give another --device or --exclude it"
        )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def tell_measuring(show: ShowProgress, words: str) -> None:
    """Show what is done between the weights that are measured."""
    show(Progress(0, 0, 1, f"measuring, {words}"))


def measure_and_solve(run: AllocateRun, show: ShowProgress) -> AllocationResult:
    """Measure the weights that are not measured yet, then solve; the allocation has its remarks."""
    counts_with, remarks = importances(run)
    measured = _measured(run, show)
    if run.options.objective == "relative" and not run.compares_layers:
        counts_with = over_norms(run.task.weights, measured)
    options = run.options
    result = solve(run.task, options.allocator, measured, counts_with)
    head = (
        f"model: {options.model}",
        f"source: {run.checkpoint.fingerprint}",
        f"allocator: {options.allocator}, objective: {options.objective}",
        *summary(run.task, result),
    )
    return replace(result, allocation=replace(result.allocation, remarks=head + remarks))


def _measured(run: AllocateRun, show: ShowProgress) -> dict[str, CandidateErrors]:
    """Return the errors of every weight, from the file of measurements or measured now; of a stack some experts are."""
    weights = _measured_ones(run.task.weights)
    run.costs.parent.mkdir(parents=True, exist_ok=True)
    with CostsFile(run.costs, run.identity, run.checkpoint.stamps) as kept:
        pending = {spec: ranks for spec in weights if (ranks := _ranks(run, spec, kept.measured.get(spec.module)))}
        walk = run.open_walk(show) if run.examples and pending else None
        if walk is not None:
            pending = {spec: pending[spec] for spec in sorted(pending, key=walk.place)}
        total, left = (sum(math.prod(spec.shape) for spec in some) for some in (weights, pending))
        new, arriving = 0, zip(pending, stream(run.checkpoint, [[spec] for spec in pending]), strict=True)
        for number, (spec, (weight_OI,)) in enumerate(arriving, start=len(weights) - len(pending) + 1):
            objective = run.objective(spec) if walk is None else walk.objective(spec)
            kept.keep(spec.module, _measure(run, spec, weight_OI, pending[spec], objective))
            new += math.prod(spec.shape)
            show(Progress(total - left + new, new, total, f"{number}/{len(weights)} weights measured"))
        return _for_all(run.task.weights, weights, kept.measured)


def _measured_ones(weights: Sequence[WeightSpec]) -> list[WeightSpec]:
    """Return all layers, and of each stack EXPERTS_MEASURED experts, evenly over the stack."""
    groups: dict[str, list[WeightSpec]] = {}
    for spec in weights:
        groups.setdefault(spec.group, []).append(spec)
    chosen = []
    for members in groups.values():
        step = max(math.ceil(len(members) / EXPERTS_MEASURED), 1)
        chosen += members[::step]
    return chosen


def _for_all(
    weights: Sequence[WeightSpec], chosen: Sequence[WeightSpec], measured: Mapping[str, CandidateErrors]
) -> dict[str, CandidateErrors]:
    """Return the errors of every weight; an expert that was not measured has those of the last one before it."""
    names, found, last = {spec.module for spec in chosen}, dict[str, CandidateErrors](), ""
    for spec in weights:
        last = spec.module if spec.module in names else last
        found[spec.module] = measured[last]
    return found


def _ranks(run: AllocateRun, spec: WeightSpec, found: CandidateErrors | None) -> tuple[int, ...]:
    """Return the ranks that are asked for and those already measured, ascending from 0; none if all are measured."""
    known = tuple(found.ranks) if found else ()
    asked = run.task.grid.measured(spec.shape, with_fixed=run.options.allocator == "bits")
    ranks = tuple(sorted({*asked, *known}))
    return () if ranks == known else ranks


def _measure(
    run: AllocateRun, spec: WeightSpec, weight_OI: Tensor, ranks: Sequence[int], objective: Objective | Moments
) -> CandidateErrors:
    codecs = [codec_named(name) for name in run.task.grid.codecs]
    like = Recipe(codecs[0], 0, dtype=getattr(torch, run.options.dtype), **run.how)
    seed = seed_of(run.options.seed, spec)
    try:
        found = measure_candidates(weight_OI.to(run.device), codecs, ranks, objective=objective, like=like, seed=seed)
        if not (run.compares_layers and isinstance(objective, Moments)):
            return found
        squares = tuple(tuple(objective.magnitude * square for square in of_rank) for of_rank in found.squares)
        return replace(found, squares=squares, norm=objective.magnitude * found.norm)
    except torch.OutOfMemoryError as error:
        raise DoesNotFit(
            f"{spec.name} {list(spec.shape)} does not fit on {run.device}; close other programs that use it, or give "
            "--device cpu"
        ) from error
    except ValueError as error:
        raise BadInput(f"{run.checkpoint.name}: {spec.name}: {error}; repair the checkpoint") from error


def read_table(file: Path, weights: Sequence[WeightSpec], tables: Sequence[Table]) -> tuple[Allocation, str]:
    """Return the allocation of a table and its text; a BadInput where it cannot be read or does not fit the weights.

    Args:
        tables: Embedding and head, which do not go with bitsandbytes' NF4.
    """
    try:
        text = file.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--allocation {file} cannot be read as a text file: {error}") from error
    allocation = from_text(text, weights, f"--allocation {file}")
    if wrong := mixing_problems(choice.codec for choice in with_tables(allocation, tables).choices.values()):
        raise BadInput(f"--allocation {file} with --head-bits or --embedding-bits: {wrong[0]}")
    return allocation, text
