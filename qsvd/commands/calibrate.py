"""`qsvd calibrate`: second moments of gradients, and traces of the Hessian, of a model that need not fit in memory."""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from qsvd.calibrate.streamed import Compute, StreamedModel
from qsvd.calibrate.sums import Sums, means
from qsvd.calibrate.walk import Probes, add_examples
from qsvd.commands.console import Position, StopRequest, quiet, watching
from qsvd.errors import DoesNotFit, Interrupted
from qsvd.files.pages import free_host_memory
from qsvd.files.statistics import open_unfinished, save_unfinished, unfinished_path, write_statistics
from qsvd.options import Calibrate
from qsvd.prepare.calibrate import Calibration, prepare_calibrate

HOST_SHARE = 0.5  # of the free host memory, for the hidden states of a chunk
MOST_CHUNK = 16  # examples that a killed run may lose; for each chunk the weights are read twice


def calibrate(options: Calibrate) -> Path:
    """Measure as `qsvd calibrate` does, silently; the file of the result.

    Raises:
        ValueError: an option, the checkpoint or the data is not usable.
        DoesNotFit: a block does not fit on the device.
    """
    with quiet():
        job = prepare_calibrate(options)
        for _ in execute(job):
            pass
    return job.out


def main(options: Calibrate) -> None:
    """Run from the command line: progress on stderr, the path on stdout.

    Raises:
        Interrupted: after Ctrl-C; the examples that are finished are kept.
    """
    with quiet():
        job = prepare_calibrate(options)
        if job.is_complete:
            print(f"{job.out} was complete already", file=sys.stderr)
        with StopRequest("chunk of examples") as stop, watching() as show:
            for position in execute(job):
                show(position)
                if stop.made and position.is_kept:
                    raise Interrupted(
                        f"interrupted; finished examples are kept, the same command goes on for {job.out}"
                    )
    print(job.out)


def execute(job: Calibration) -> Iterator[Position]:
    """Do the work; yields after every visit of a block, and after every chunk of examples that is kept.

    A run that stops loses the chunk it is at: the same job goes on there, to the same bytes.
    """
    if job.is_complete:
        return
    job.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield from _execute(job)
    except torch.OutOfMemoryError as error:
        raise DoesNotFit(
            f"a block of {job.options.model} with its gradients does not fit on {job.device} for {_longest(job)} "
            "tokens; give a smaller --max-length, close what else uses it, or take --device cpu"
        ) from error


def _execute(job: Calibration) -> Iterator[Position]:
    kept = open_unfinished(job.out, job.identity)
    sums = Sums.empty(job.plan.weights, job.device, has_traces=job.options.traces > 0)
    if kept is not None:
        sums = Sums({name: tensor.to(job.device) for name, tensor in kept.items()})
    model = StreamedModel(job.checkpoint, job.plan, Compute(job.device, job.dtype, job.options.traces > 0))
    probes = Probes(job.options.traces, job.options.seed)
    first, total = sums.num_examples, len(job.examples)
    chunk = _chunk(job, model)
    for start in range(first, total, chunk):
        examples = job.examples[start : start + chunk]
        visits = 2 * model.num_blocks
        for number, _ in enumerate(add_examples(model, examples, sums, probes, first=start), start=1):
            done = start + len(examples) * number / visits
            yield _position(job, sums, start, done, first)
        save_unfinished(job.out, sums.values, job.identity)
        yield _position(job, sums, start + len(examples), start + len(examples), first)
    _finish(job, sums)


def _finish(job: Calibration, sums: Sums) -> None:
    """Write the result, then drop what only a resumed run needs."""
    record = {
        "model": job.checkpoint.name,
        "revision": job.checkpoint.revision,
        "architecture": job.plan.architecture,
        "data": job.options.data,
        "examples": sums.num_examples,
        "tokens": job.num_tokens,
        "seed": job.options.seed,
        "max_length": job.options.max_length,
        "traces": job.options.traces,
        "loss": sums.loss,
        "run": job.identity,
    }
    tensors = means(sums, job.plan.weights, job.options.traces)
    write_statistics(job.out, tensors, fingerprint=job.checkpoint.fingerprint, record=record)
    unfinished_path(job.out).unlink(missing_ok=True)


def _position(job: Calibration, sums: Sums, kept: int, done: float, first: int) -> Position:
    total = len(job.examples)
    loss = sums.loss if sums.num_examples else None
    return Position(kept, total, done / total, (done - first) / total, loss, is_kept=done == kept)


def _chunk(job: Calibration, model: StreamedModel) -> int:
    """As asked for, or as many examples as have their hidden states, and tangents of these, in half the free memory."""
    if job.options.chunk is not None:
        return job.options.chunk
    tokens, hidden = _longest(job), job.checkpoint.config.get_text_config().hidden_size
    states = tokens * hidden * (model.num_blocks + 1) * (1 + job.options.traces)
    masks = tokens**2 * model.num_blocks  # at most, where every block has its own
    each = (states + masks) * job.dtype.itemsize
    return max(1, min(len(job.examples), MOST_CHUNK, int(HOST_SHARE * free_host_memory()) // each))


def _longest(job: Calibration) -> int:
    """Tokens of the longest example."""
    return max(len(example.input_ids) for example in job.examples)
