"""`qsvd quantize`: one weight after another from the checkpoint into OUT, then the files around them."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from qsvd.checkpoint.layout import adapter_tensors, residual_tensors
from qsvd.checkpoint.stream import stream
from qsvd.checkpoint.tensor_file import DTYPE_NAMES, NewTensor, TensorEntry
from qsvd.checkpoint.write import OutputFolder
from qsvd.commands.finish import finish
from qsvd.commands.prepare import Job, check_disk, prepare
from qsvd.decompose.alternate import split_weight
from qsvd.decompose.measure import WeightError, measure
from qsvd.options import Quantize
from qsvd.plan.model import WeightSpec
from qsvd.report.record import from_record, to_record


@dataclass(frozen=True)
class Progress:
    """How far a run is: weights finished, bytes of them in the source, and the error of the last one."""

    weights: int
    num_bytes: int
    error: WeightError


def quantize(options: Quantize) -> Path:
    """Split a checkpoint as `qsvd quantize` does, silently; the folder of the result.

    Raises:
        ValueError: an option, or the checkpoint, is not usable.
        DoesNotFit: the result does not fit on the disk.
        OSError: the folder cannot be written. What is finished stays; the same call goes on there.
    """
    job = prepare(options)
    for _ in execute(job):
        pass
    return job.out


def execute(job: Job) -> Iterator[Progress]:
    """Do the work; yields after every weight, those of an earlier run first.

    Stopping between two weights loses nothing: the same job goes on there, to the same bytes.
    """
    folder = OutputFolder(job.out, job.identity)
    if folder.is_complete:
        return
    check_disk(job)
    weights = job.plan.weights
    pending = [number for shard in job.shards for number in shard.weights if not folder.is_done(number)]
    tensors = stream(job.checkpoint, [weights[number].name for number in pending])
    num_bytes = 0
    for shard in job.shards:
        if (job.out / shard.file).is_file() and all(folder.is_done(number) for number in shard.weights):
            continue
        for number in shard.weights:
            if not folder.is_done(number):
                _split(job, folder, number, next(tensors))
            num_bytes += job.checkpoint.tensors[weights[number].name].num_bytes
            yield Progress(number + 1, num_bytes, from_record(folder.record(number)))
        folder.write_shard(shard.file, shard.weights, [_copied(job, name) for name in shard.copied])
    finish(job, folder)


def _split(job: Job, folder: OutputFolder, number: int, weight_OI: Tensor) -> None:
    """Split, measure and keep one weight."""
    spec = job.plan.weights[number]
    seed = _seed(job.options.seed, spec)
    weight_OI = weight_OI.to(job.device)
    try:
        split = split_weight(weight_OI, job.recipe, seed=seed)
    except ValueError as error:
        raise ValueError(f"{job.checkpoint.name}: {spec.name}: {error}; repair the checkpoint") from error
    error = measure(weight_OI, split, name=spec.module, role=spec.role, seed=seed)
    residual = residual_tensors(spec.name, split.residual, job.compute_dtype)
    residual = {name: tensor.cpu() for name, tensor in residual.items()}
    folder.save(number, residual, adapter_tensors(spec.module, split), to_record(error))


def _seed(seed: int, spec: WeightSpec) -> int:
    """A seed for this weight alone, so that neither the order nor a resumed run changes its sketch."""
    return int.from_bytes(hashlib.sha256(f"{seed} {spec.module}".encode()).digest()[:6])


def _copied(job: Job, name: str) -> NewTensor:
    entry = job.checkpoint.tensors[name]
    if isinstance(entry, TensorEntry):
        return NewTensor(name, entry.dtype, entry.shape, entry)
    tensor = job.checkpoint.read(name)
    return NewTensor(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), tensor)
