"""Everything about an allocation that can be known, checked and refused before a weight is read."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qsvd.decompose.candidates import PASSES, CandidateErrors, measure_candidates
from qsvd.decompose.objective import PLAIN
from qsvd.errors import BadInput, DoesNotFit
from qsvd.files.atomic import file_sha256
from qsvd.files.check import check_complete, check_not_quantized
from qsvd.files.source import Checkpoint, open_checkpoint, stream
from qsvd.files.statistics import CostsFile, Statistics, statistics_for
from qsvd.memory.device import device_of
from qsvd.numerics.names import codec_named
from qsvd.options import Allocate
from qsvd.plan.allocation import TITLE
from qsvd.plan.budget import parse_budget
from qsvd.plan.grid import grid_of
from qsvd.plan.solve import AllocationProblem, AllocationResult, check_feasible, over_norms, solve
from qsvd.plan.weights import ModelPlan, WeightSpec, plan_model
from qsvd.prepare.machine import machine, seed_of
from qsvd.report.allocation import summary

COPY_BYTES = 24  # of a number: the weight in float32, three copies of it, and two weights as they are stored
DIGEST = "# digest: "  # of all other lines; an edited table has another


@dataclass(frozen=True)
class AllocateJob:
    """A checked run of `qsvd allocate`."""

    options: Allocate
    checkpoint: Checkpoint
    task: AllocationProblem
    statistics: Statistics | None
    device: torch.device
    dtype: torch.dtype

    @property
    def out(self) -> Path:
        """The table."""
        return self.options.out.expanduser()

    @property
    def costs(self) -> Path:
        """Where measurements are kept."""
        return self.out.with_name(f"{self.out.name}.costs.jsonl")

    @property
    def is_fisher(self) -> bool:
        """Whether rows and columns are weighted while candidates are measured."""
        return self.options.objective == "fisher"

    @property
    def identity(self) -> dict[str, Any]:
        """What measurements depend on. The Hessian weights whole matrices, after they are measured."""
        options, grid = self.options, self.task.grid
        fisher = self.statistics if self.is_fisher else None
        return {
            "source_fingerprint": self.checkpoint.fingerprint,
            "codecs": list(grid.codecs),
            "ranks": None if grid.ranks is None else list(grid.ranks),
            "passes": PASSES,
            "statistics": None if fisher is None else file_sha256(fisher.path),
            "dtype": options.dtype,
            "device": self.device.type,
            "seed": options.seed,
        }


def prepare_allocate(
    options: Allocate, checkpoint: Checkpoint | None = None, plan: ModelPlan | None = None
) -> AllocateJob:
    """Open what is needed, and refuse what cannot be done.

    Args:
        checkpoint: An open one; None opens options.model.
        plan: Of that checkpoint, complete; None makes it.

    Raises:
        BadInput: an option, the checkpoint or the statistics are not usable.
        DoesNotFit: the largest weight cannot be measured in the memory that is free.
    """
    if not options.gap >= 0 or not options.time_limit > 0:
        raise BadInput(f"--gap {options.gap} and --time-limit {options.time_limit}: at least 0, and above 0 seconds")
    device, dtype = device_of(options.device), getattr(torch, options.dtype)
    checkpoint = checkpoint or open_checkpoint(options.model)
    if plan is None:
        check_not_quantized(checkpoint.config, checkpoint.tensors)
        plan = plan_model(checkpoint.config, include=options.include, exclude=options.exclude)
        plan = check_complete(checkpoint, plan)
    task = AllocationProblem(
        weights=plan.weights,
        grid=grid_of(options.codecs, options.ranks, options.rank, plan.weights),
        budget=parse_budget(options.budget, plan.weights),
        factor_bytes=dtype.itemsize,
        count=options.count,
        gap=options.gap,
        time_limit=options.time_limit,
    )
    check_feasible(task, options.allocator)
    statistics = statistics_for(options.objective, options.statistics, checkpoint, plan.weights)
    job = AllocateJob(options, checkpoint, task, statistics, device, dtype)
    _check_replaceable(job.out, checkpoint.fingerprint)
    _check_memory(job)
    return job


def sealed(text: str) -> str:
    """A table with a remark by which an edited one is told."""
    title, rest = text.split("\n", maxsplit=1)
    return f"{title}\n{DIGEST}{_digest(text)}\n{rest}"


def is_sealed(text: str) -> bool:
    """Whether a table is as `sealed` gave it."""
    lines = text.split("\n")
    digests = [line for line in lines if line.startswith(DIGEST)]
    rest = "\n".join(line for line in lines if not line.startswith(DIGEST))
    return digests == [f"{DIGEST}{_digest(rest)}"]


def importances(job: AllocateJob) -> tuple[Mapping[str, float] | None, tuple[str, ...]]:
    """What each weight's squared error is multiplied with, None for 1, and remarks on it.

    HAWQ-V3's (arXiv:2011.10680): the mean of the Hessian's trace over the numbers of the weight. A Hessian estimated
    from few examples can have a trace that is not above zero; it counts as the least that is.

    Raises:
        BadInput: no trace is above zero.
    """
    if job.options.objective != "hessian":
        return None, ()
    assert job.statistics is not None, "checked before"
    means = {spec.module: job.statistics.trace(spec.module) / math.prod(spec.shape) for spec in job.task.weights}
    above = [mean for mean in means.values() if mean > 0]
    if not above:
        raise BadInput(f"{job.statistics.path} has no trace above zero; run qsvd calibrate with more --traces")
    raised = len(means) - len(above)
    remark = (f"traces: {raised} of {len(means)} are not above zero and count as the least that is",) if raised else ()
    return {module: max(mean, min(above)) for module, mean in means.items()}, remark


def _check_replaceable(path: Path, fingerprint: str) -> None:
    """Refuse to lose what somebody wrote or edited.

    Raises:
        BadInput: the path is something else than an unedited table of the same model.
    """
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if not text.startswith(TITLE):
        raise BadInput(f"--out {path} is there already and is no table of qsvd allocate; give another name")
    if not is_sealed(text):
        raise BadInput(f"--out {path} was edited by hand; give another name, or move it away")
    if f"# source: {fingerprint}\n" not in text:
        raise BadInput(f"--out {path} is the table of another model; give another name")


def _check_memory(job: AllocateJob) -> None:
    largest = max(job.task.weights, key=lambda spec: math.prod(spec.shape))
    needed = COPY_BYTES * math.prod(largest.shape)
    limits = machine(job.device, torch.float32).limits
    free = limits.gpu if job.device.type == "cuda" else limits.host
    if free is not None and needed > free:
        raise DoesNotFit(
            f"{largest.name} {list(largest.shape)} needs about {needed / 1e9:.1f} GB on {job.device} to be measured, "
            f"and {free / 1e9:.1f} GB are free; close what else uses it, take another --device, or --exclude the weight"
        )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Progressed:
    """How far measuring is.

    elements, of total_elements, are the numbers of measured weights; new_elements those of this run alone.
    """

    weights: int
    num_weights: int
    elements: int
    new_elements: int
    total_elements: int

    @property
    def share(self) -> float:
        return self.elements / self.total_elements

    @property
    def is_end(self) -> bool:
        return self.weights == self.num_weights

    def line(self, seconds: float) -> str:
        speed = self.new_elements / max(seconds, 1e-9)
        left = f"{(self.total_elements - self.elements) / speed:.0f} s left" if speed else "resumed"
        return f"{self.weights}/{self.num_weights} weights measured, {left}"


ShowProgress = Callable[[Progressed], None]


def execute(job: AllocateJob, show: ShowProgress) -> AllocationResult:
    """Measure what is not measured yet, then choose; the allocation has its remarks."""
    counts_with, remarks = importances(job)
    measured = _measured(job, show)
    if job.options.objective == "relative":
        counts_with = over_norms(job.task.weights, measured)
    result = solve(job.task, job.options.allocator, measured, counts_with)
    allocation = replace(result.allocation, remarks=_remarks(job, result) + remarks)
    return replace(result, allocation=allocation)


def _measured(job: AllocateJob, show: ShowProgress) -> dict[str, CandidateErrors]:
    """Of every weight, from the file or now."""
    weights = job.task.weights
    job.costs.parent.mkdir(parents=True, exist_ok=True)
    with CostsFile(job.costs, job.identity) as kept:
        done = [spec for spec in weights if _is_measured(job, spec, kept)]
        pending = [spec for spec in weights if spec not in done]
        before = len(done)
        for spec, weight_OI in zip(pending, stream(job.checkpoint, pending), strict=True):
            kept.keep(spec.module, _measure(job, spec, weight_OI, _ranks(job, spec, kept)))
            done.append(spec)
            elements, old, total = map(_elements, (done, done[:before], weights))
            show(Progressed(len(done), len(weights), elements, elements - old, total))
        return dict(kept.measured)


def _is_measured(job: AllocateJob, spec: WeightSpec, kept: CostsFile) -> bool:
    """Whether there is a line with every rank that is asked for; where ranks lack, a new line takes its place."""
    found = kept.measured.get(spec.module)
    return found is not None and tuple(found.ranks) == _ranks(job, spec, kept)


def _ranks(job: AllocateJob, spec: WeightSpec, kept: CostsFile) -> tuple[int, ...]:
    """What is to be measured of a weight, and what has been, rising from 0."""
    found = kept.measured.get(spec.module)
    asked = job.task.grid.measured(spec.shape, with_fixed=job.options.allocator == "bits")
    return tuple(sorted({*asked, *(found.ranks if found else ())}))


def _elements(weights: Sequence[WeightSpec]) -> int:
    return sum(math.prod(spec.shape) for spec in weights)


def _measure(job: AllocateJob, spec: WeightSpec, weight_OI: Tensor, ranks: Sequence[int]) -> CandidateErrors:
    grid = job.task.grid
    objective = job.statistics.objective(spec.module) if job.is_fisher and job.statistics else PLAIN
    try:
        return measure_candidates(
            weight_OI.to(job.device),
            [codec_named(name) for name in grid.codecs],
            ranks,
            objective=objective,
            dtype=job.dtype,
            seed=seed_of(job.options.seed, spec),
        )
    except torch.OutOfMemoryError as error:
        raise DoesNotFit(
            f"{spec.name} {list(spec.shape)} does not fit on {job.device}; close what else uses it, or give "
            "--device cpu"
        ) from error
    except ValueError as error:
        raise BadInput(f"{job.checkpoint.name}: {spec.name}: {error}; repair the checkpoint") from error


def _remarks(job: AllocateJob, result: AllocationResult) -> tuple[str, ...]:
    options = job.options
    return (
        f"model: {options.model}",
        f"source: {job.checkpoint.fingerprint}",
        f"allocator: {options.allocator}, objective: {options.objective}",
        *summary(job.task, result),
    )
