"""`qsvd allocate`: measure the candidates of every weight, solve for the best choices, write them as a table."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from rich.console import Console
from torch import Tensor

from qsvd.checkpoint.costs_file import CostsFile
from qsvd.checkpoint.read import Checkpoint
from qsvd.checkpoint.stream import stream
from qsvd.checkpoint.whole_file import write_text
from qsvd.commands.failures import DoesNotFit, Interrupted
from qsvd.commands.prepare_allocate import AllocateJob, importances, prepare_allocate, sealed
from qsvd.commands.seeds import seed_of
from qsvd.commands.silence import silent_stdout
from qsvd.commands.watch import StopRequest, watching
from qsvd.commands.watch_measuring import Progressed, ShowProgress
from qsvd.decompose.candidates import Measured, measure_candidates
from qsvd.decompose.objective import PLAIN
from qsvd.numerics.codecs import codec_named
from qsvd.options import Allocate
from qsvd.plan.allocate import Result, over_norms
from qsvd.plan.allocate import allocate as solve
from qsvd.plan.allocation import to_text
from qsvd.plan.model import WeightSpec
from qsvd.report.allocation import allocation_tables, summary


def execute(job: AllocateJob, show: ShowProgress) -> Result:
    """Measure what is not measured yet, then choose; the allocation has its remarks."""
    counts_with, remarks = importances(job)
    measured = _measured(job, show)
    if job.options.objective == "relative":
        counts_with = over_norms(job.task.weights, measured)
    with silent_stdout():
        result = solve(job.task, job.options.allocator, measured, counts_with)
    allocation = replace(result.allocation, remarks=_remarks(job, result) + remarks)
    return replace(result, allocation=allocation)


def main(options: Allocate, checkpoint: Checkpoint | None = None) -> None:
    """Run from the command line: progress on stderr, the summary on stdout.

    Args:
        checkpoint: An open one; None opens options.model.

    Raises:
        Interrupted: after Ctrl-C; the weights that are measured are kept.
    """
    job = prepare_allocate(options, checkpoint)
    with StopRequest("weight") as stop, watching() as show:

        def show_or_stop(done: Progressed) -> None:
            show(done)
            if stop.made:
                raise Interrupted(
                    f"interrupted; measured weights are kept in {job.costs}, the same command goes on there"
                )

        result = execute(job, show_or_stop)
    write_text(job.out, sealed(to_text(result.allocation, job.task.weights, job.task.factor_bytes)))
    Console().print(allocation_tables(job.task, result), highlight=False)
    print(f"\n{job.out}")


def _measured(job: AllocateJob, show: ShowProgress) -> dict[str, Measured]:
    """Of every weight, from the file or now."""
    weights = job.task.weights
    job.costs.parent.mkdir(parents=True, exist_ok=True)
    with CostsFile(job.costs, job.identity) as kept:
        done = [spec for spec in weights if _is_measured(job, spec, kept)]
        pending = [spec for spec in weights if spec not in done]
        before = len(done)
        for spec, weight_OI in zip(pending, stream(job.checkpoint, [spec.name for spec in pending]), strict=True):
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


def _measure(job: AllocateJob, spec: WeightSpec, weight_OI: Tensor, ranks: Sequence[int]) -> Measured:
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
        raise ValueError(f"{job.checkpoint.name}: {spec.name}: {error}; repair the checkpoint") from error


def _remarks(job: AllocateJob, result: Result) -> tuple[str, ...]:
    options = job.options
    return (
        f"model: {options.model}",
        f"source: {job.checkpoint.fingerprint}",
        f"allocator: {options.allocator}, objective: {options.objective}",
        *summary(job.task, result),
    )
