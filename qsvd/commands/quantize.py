"""`qsvd quantize`: one weight after another from the checkpoint into OUT, then the files around them."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import sqrt
from pathlib import Path

import torch
from torch import Tensor

from qsvd.commands.console import Standing, StopRequest, watching
from qsvd.commands.report import show_report
from qsvd.decompose.alternate import split_weight
from qsvd.decompose.split import measure
from qsvd.errors import BadInput, DoesNotFit, Interrupted
from qsvd.files.layout import adapter_tensors, packed_tensors, residual_tensors
from qsvd.files.output import OutputFolder
from qsvd.files.safetensors import NewTensor, TensorEntry
from qsvd.files.source import Checkpoint, stream
from qsvd.files.workspace import UNFINISHED
from qsvd.options import Quantize
from qsvd.prepare.allocate import Progressed
from qsvd.prepare.machine import seed_of
from qsvd.prepare.outputs import finish, show_plan
from qsvd.prepare.quantize import Job, Source, check_disk, check_memory, job_of, prepare, prepare_source, settled
from qsvd.records import WeightError
from qsvd.report.errors import from_record, to_record


@dataclass(frozen=True)
class Finished:
    """A weight that is finished: its source bytes, its error, and whether this run did it or an earlier one."""

    num_bytes: int
    error: WeightError
    is_new: bool


def quantize(options: Quantize) -> Path:
    """Split a checkpoint as `qsvd quantize` does, silently; the folder of the result.

    Raises:
        BadInput: an option, or the checkpoint, is not usable.
        DoesNotFit: the result does not fit on the disk.
        OSError: the folder cannot be written. What is finished stays; the same call goes on there.
    """
    job = prepare(options)
    for _ in execute(job):
        pass
    return job.source.out


def execute(job: Job) -> Iterator[Finished]:
    """Do the work; yields after every weight, those of an earlier run first.

    Stopping between two weights loses nothing: the same job goes on there, to the same bytes.
    """
    check_memory(job)
    check_disk(job)
    with OutputFolder(job.source.out, job.source.identity) as folder:
        if not folder.is_complete:
            yield from _fill(job, folder)
            finish(job, folder)


def _fill(job: Job, folder: OutputFolder) -> Iterator[Finished]:
    """Split what is not split yet and write every shard that is not there."""
    weights = job.source.plan.weights
    pending = [number for shard in job.shards for number in shard.weights if not folder.is_done(number)]
    tensors = stream(job.source.checkpoint, [weights[number] for number in pending])
    for shard in job.shards:
        is_written = (job.source.out / shard.file).is_file()
        for number in shard.weights:
            is_new = not folder.is_done(number)
            if is_new:
                _split(job, folder, number, next(tensors))
            num_bytes = job.source.checkpoint.tensors[weights[number].name].num_bytes
            yield Finished(num_bytes, from_record(folder.weight_record(number)), is_new)
        if not is_written:
            folder.write_shard(shard.file, shard.weights, [copied(job, name) for name in shard.copied])


def _split(job: Job, folder: OutputFolder, number: int, weight_OI: Tensor) -> None:
    """Split, measure and keep one weight."""
    source, spec = job.source, job.source.plan.weights[number]
    seed, objective = seed_of(source.options.seed, spec), source.objective(spec.module)
    try:
        weight_OI = weight_OI.to(source.device)
        split = split_weight(weight_OI, job.recipes[spec.module], seed=seed, objective=objective)
        measured = measure(weight_OI, split, name=spec.module, role=spec.role, seed=seed)
    except torch.OutOfMemoryError as error:
        raise DoesNotFit(
            f"{spec.name} {list(spec.shape)} needs about {16 * weight_OI.numel() / 1e9:.1f} GB on {source.device}; "
            "close what else uses it, or give --device cpu"
        ) from error
    except ValueError as error:
        raise BadInput(f"{source.checkpoint.name}: {spec.name}: {error}; repair the checkpoint") from error
    if job.allocation.is_plain:
        residual = residual_tensors(spec.name, split.residual, source.compute_dtype)
    else:
        residual = packed_tensors(spec.name, split.residual)
    residual = {name: tensor.cpu() for name, tensor in residual.items()}
    folder.save(number, residual, adapter_tensors(spec.module, split), to_record(measured))


def copied(job: Job, name: str) -> NewTensor:
    """A tensor of the source as it is; copied from its file, or read when its turn comes."""
    checkpoint = job.source.checkpoint
    entry = checkpoint.tensors[name]
    values = entry if isinstance(entry, TensorEntry) else partial(checkpoint.read, name)
    return NewTensor(name, entry.dtype, entry.shape, values)


def main(options: Quantize, checkpoint: Checkpoint | None = None) -> None:
    """Run from the command line: progress on stderr, the report on stdout.

    Args:
        checkpoint: An open one; None opens options.model.

    Raises:
        Interrupted: after Ctrl-C; the weights that are finished are kept.
    """
    source = prepare_source(options, checkpoint)
    if options.dry_run:
        job = job_of(source, source.table)
        check_disk(job)
        show_plan(job)
        return
    finished: list[Finished] = []
    with StopRequest("weight") as stop, _said_what_stays(source.out):
        job = _settled(source, stop)
        with watching() as show:
            for weight in execute(job):
                finished.append(weight)
                show(_standing(job, finished))
                if stop.made:
                    raise _interrupted("finished", source)
    if not any(weight.is_new for weight in finished):
        print(f"{job.source.out} was complete already", file=sys.stderr)
    show_report(job.source.out, worst=5)
    print(f"\n{job.source.out}")


def _settled(source: Source, stop: StopRequest) -> Job:
    """The job; with a budget, measuring is shown and can be stopped."""
    if source.options.budget is None:
        return job_of(source, source.table)
    with watching() as show:

        def show_or_stop(done: Progressed) -> None:
            show(done)
            if stop.made:
                raise _interrupted("measured", source)

        return settled(source, show_or_stop)


def _interrupted(which: str, source: Source) -> Interrupted:
    return Interrupted(f"interrupted; {which} weights are kept, the same command goes on in {source.out}")


@contextmanager
def _said_what_stays(out: Path) -> Iterator[None]:
    """Add to an error of the disk that nothing is lost, where that is so."""
    try:
        yield
    except OSError as error:
        if not (out / UNFINISHED).is_dir():
            raise
        reason = f"{error.strerror}; finished weights are kept, the same command goes on in {out}"
        raise OSError(error.errno, reason, error.filename) from error


def _standing(job: Job, finished: Sequence[Finished]) -> Standing:
    before, after = (
        sum(getattr(weight.error, state).frobenius ** 2 for weight in finished) for state in ("before", "after")
    )
    return Standing(
        weights=len(finished),
        num_weights=len(job.source.plan.weights),
        num_bytes=sum(weight.num_bytes for weight in finished),
        new_bytes=sum(weight.num_bytes for weight in finished if weight.is_new),
        total_bytes=job.sizes.source,
        reduction=100 * (1 - sqrt(after / before)) if before else 0.0,
    )
