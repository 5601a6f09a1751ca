"""`qsvd calibrate`: second moments of gradients, traces of the Hessian, and singular vectors of the gradient.

The model need not fit in memory.
"""

import sys
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from qsvd.calibrate.gradients import GradientSums
from qsvd.calibrate.streamed import StreamedModel
from qsvd.calibrate.sums import Sums, means
from qsvd.calibrate.walk import AT, AT_BLOCKS, Probes, add_examples
from qsvd.console.progress import quiet, say, watched
from qsvd.errors import DoesNotFit
from qsvd.files.statistics import (
    lock_statistics,
    open_statistics,
    open_unfinished,
    save_unfinished,
    unfinished_path,
    write_statistics,
)
from qsvd.memory.device import free_host_memory
from qsvd.options import Calibrate
from qsvd.prepare.calibrate import CalibrateRun, prepare_calibrate
from qsvd.records import Progress, ShowProgress, show_nothing
from qsvd.report.next_commands import after_calibrate, last_lines
from qsvd.report.results import CalibrateResult

HOST_SHARE = 0.5  # of the free CPU memory, for the hidden states of a chunk
MOST_CHUNK = 16  # examples that a killed run may lose; for each chunk the weights are read twice


def main(options: Calibrate) -> None:
    """Run `qsvd calibrate`: 1 check, 2 measure and show progress, 3 print the path.

    Raises:
        Interrupted: after Ctrl-C; the examples that are finished are kept.
    """
    with quiet():
        run = prepare_calibrate(options)
        if run.cut:
            say(run.cut, file=sys.stderr)
        if run.is_complete:
            say(f"{run.out} was complete already", file=sys.stderr)
        unit, what = ("chunk of examples", "examples") if options.gradient_rank is None else ("block", "blocks")
        with watched(unit, f"finished {what} are kept, the same command continues for {run.out}") as show:
            measure(run, show)
    say(run.out)
    say(last_lines("statistics", options.out, after_calibrate(options)), file=sys.stderr)


def calibrate(options: Calibrate, show: ShowProgress = show_nothing) -> CalibrateResult:
    """Measure sensitivity as `qsvd calibrate` does, silently, and return the file.

    Raises:
        BadInput: an option, the 16-bit model or the data cannot be used.
        DoesNotFit: a block does not fit on the device.
    """
    with quiet():
        run = prepare_calibrate(options)
        measure(run, show)
    record = open_statistics(run.out).record
    return CalibrateResult(run.out, record["examples"], record["tokens"], record["loss"])


def measure(run: CalibrateRun, show: ShowProgress) -> None:
    """Do the work of a checked run.

    A run that stops loses the chunk of examples that it works on, or with --gradient-rank the forward pass and one
    block of the backward pass: the same run continues there, to the same bytes.

    Args:
        show: Is called after every block and after every chunk of examples. What it raises ends the work.
    """
    if run.is_complete:
        return
    run.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with lock_statistics(run.out):
            if not replace(run).is_complete:  # another process may have written the file before the lock was free
                _measure(run, show)
    except torch.OutOfMemoryError as error:
        raise DoesNotFit(
            f"a block of {run.options.model} with its gradients does not fit on {run.device} for {_longest(run)} "
            "tokens; give a smaller --max-length, close other programs that use it, or give --device cpu"
        ) from error


def _measure(run: CalibrateRun, show: ShowProgress) -> None:
    kept = open_unfinished(run.out, run.identity, run.checkpoint.stamps) or {}
    at = {name: tensor for name, tensor in kept.items() if name.startswith(AT)}
    sums = Sums.empty(run.plan.weights, run.device, has_traces=run.options.traces > 0)
    sums.values |= {name: tensor.to(run.device) for name, tensor in kept.items() if name not in at}
    model = StreamedModel(run.checkpoint, run.plan, run.device, run.dtype, twice=run.options.traces > 0)
    probes = Probes(run.options.traces, run.options.seed)
    if run.options.gradient_rank is not None:
        _add_all(run, model, sums, probes, at, show)
        _finish(run, sums)
        return
    first, total = sums.num_examples, len(run.examples)
    chunk = _chunk_size(run, model)

    def tell(kept: int, done: float) -> None:
        loss = f"loss {sums.loss:.4f}" if sums.num_examples else ""
        what = f"{100 * done / total:.0f} %, {kept}/{total} examples kept"
        show(Progress(done, done - first, total, what, more=loss, may_stop=done == kept))

    for start in range(first, total, chunk):
        examples = run.examples[start : start + chunk]
        turns = 2 * model.num_blocks  # every block computes forward and backward
        for number, _ in enumerate(add_examples(model, examples, sums, probes, first=start), start=1):
            tell(start, start + len(examples) * number / turns)
        sums.check_finite()
        save_unfinished(run.out, sums.values, run.identity, run.checkpoint.stamps)
        tell(start + len(examples), start + len(examples))
    _finish(run, sums)


def _add_all(  # each is a part of the run
    run: CalibrateRun,
    model: StreamedModel,
    sums: Sums,
    probes: Probes,
    at: Mapping[str, Tensor],
    show: ShowProgress,
) -> None:
    """Add all examples at once, since gradients are summed over all; keep every block of the backward pass.

    Args:
        at: Where an earlier run was.
    """
    assert run.options.gradient_rank is not None, "asked before"
    needed, free = _bytes_each(run, model) * len(run.examples), HOST_SHARE * free_host_memory()
    if needed > free:
        raise DoesNotFit(
            f"--gradient-rank keeps the hidden states of all {len(run.examples)} examples, {needed / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are half of the free CPU memory; give fewer --examples or a smaller --max-length"
        )
    experts = frozenset(spec.module for spec in run.plan.weights if spec.stack)
    sums.gradients = GradientSums(run.options.gradient_rank, run.options.seed, experts)
    done, total = int(at.get(AT_BLOCKS, 0)), model.num_blocks
    walk = add_examples(model, run.examples, sums, probes, first=0, at=at)
    for number, reached in enumerate(walk, start=2 * done + 1):
        if reached:
            sums.check_finite()
            save_unfinished(run.out, {**sums.values, **reached}, run.identity, run.checkpoint.stamps)
        what = f"{50 * number / total:.0f} %, {int(reached.get(AT_BLOCKS, done))}/{total} blocks kept"
        loss = f"loss {sums.loss:.4f}" if sums.num_examples else ""
        show(Progress(number / 2, number / 2 - done, total, what, more=loss))


def _finish(run: CalibrateRun, sums: Sums) -> None:
    """Write the file, then drop what only a resumed run needs."""
    sums.check_finite()
    record = {
        "model": run.checkpoint.name,
        "revision": run.checkpoint.revision,
        "architecture": run.plan.architecture,
        "data": run.options.data,
        "examples": sums.num_examples,
        "tokens": run.num_tokens,
        "seed": run.options.seed,
        "max_length": run.options.max_length,
        "traces": run.options.traces,
        "gradient_rank": run.options.gradient_rank,
        "loss": sums.loss,
        "run": run.identity,
    }
    tensors = means(sums, run.plan.weights, run.options.traces)
    write_statistics(run.out, tensors, fingerprint=run.checkpoint.fingerprint, record=record)
    unfinished_path(run.out).unlink(missing_ok=True)


def _chunk_size(run: CalibrateRun, model: StreamedModel) -> int:
    """Return --chunk, or how many examples have hidden states and tangents that fit in half of the free CPU memory."""
    if run.options.chunk is not None:
        return run.options.chunk
    most = int(HOST_SHARE * free_host_memory()) // _bytes_each(run, model)
    return max(1, min(len(run.examples), MOST_CHUNK, most))


def _bytes_each(run: CalibrateRun, model: StreamedModel) -> int:
    """Return the bytes of the hidden states and tangents of the longest example."""
    tokens, hidden = _longest(run), run.checkpoint.config.get_text_config().hidden_size
    states = tokens * hidden * (model.num_blocks + 1) * (1 + run.options.traces)
    masks = tokens**2 * model.num_blocks  # at most, where every block has its own
    return (states + masks) * run.dtype.itemsize


def _longest(run: CalibrateRun) -> int:
    """Return the number of tokens of the longest example."""
    return max(len(example.input_ids) for example in run.examples)
