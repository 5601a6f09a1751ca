"""`qsvd allocate`: measure the candidates of every weight, solve for the best choices, write them as a table."""

import hashlib
import math
import sys
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
        pending = [spec for spec in weights if spec.module not in kept.measured]
        if not pending:
            print(f"all weights are measured already, in {job.costs}", file=sys.stderr)
        done = [spec for spec in weights if spec.module in kept.measured]
        before = len(done)
        for spec, weight_OI in zip(pending, stream(job.checkpoint, [spec.name for spec in pending]), strict=True):
            kept.keep(spec.module, _measure(job, spec, weight_OI))
            done.append(spec)
            elements, old, total = map(_elements, (done, done[:before], weights))
            show(Progressed(len(done), len(weights), elements, elements - old, total))
        return dict(kept.measured)


def _elements(weights: Sequence[WeightSpec]) -> int:
    return sum(math.prod(spec.shape) for spec in weights)


def _measure(job: AllocateJob, spec: WeightSpec, weight_OI: Tensor) -> Measured:
    grid = job.task.grid
    try:
        objective = job.statistics.objective(spec.module) if job.is_fisher and job.statistics else PLAIN
        return measure_candidates(
            weight_OI.to(job.device),
            [codec_named(name) for name in grid.codecs],
            grid.measured(spec.shape),
            objective=objective,
            dtype=job.dtype,
            seed=_seed(job.options.seed, spec),
        )
    except torch.OutOfMemoryError as error:
        raise DoesNotFit(
            f"{spec.name} {list(spec.shape)} does not fit on {job.device}; close what else uses it, or give "
            "--device cpu"
        ) from error
    except ValueError as error:
        raise ValueError(f"{job.checkpoint.name}: {spec.name}: {error}; repair the checkpoint") from error


def _seed(seed: int, spec: WeightSpec) -> int:
    """Of this weight alone, so that a resumed run draws the same."""
    return int.from_bytes(hashlib.sha256(f"{seed} {spec.module}".encode()).digest()[:6])


def _remarks(job: AllocateJob, result: Result) -> tuple[str, ...]:
    options = job.options
    return (
        f"model: {options.model}",
        f"source: {job.checkpoint.fingerprint}",
        f"allocator: {options.allocator}, objective: {options.objective}",
        *summary(job.task, result),
    )
