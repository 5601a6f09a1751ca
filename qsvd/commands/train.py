"""`qsvd train`: adapters beside the residual, from a base and a data set to a run that can be loaded and exported."""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from qsvd.adapters.load import load
from qsvd.adapters.model import moved_bytes, trained
from qsvd.commands.console import StopRequest, quiet, watching_steps
from qsvd.data.preview import preview
from qsvd.errors import DoesNotFit, Interrupted, show_size
from qsvd.evaluate.accuracy import accuracy, mean_loss
from qsvd.files.atomic import whole_file, write_text
from qsvd.options import Train
from qsvd.prepare.train import RunJob, prepare_run
from qsvd.report.training import RunSummary, loss_plot, run_readme, training_tables
from qsvd.training.guards import memory_advice
from qsvd.training.run_folder import START, SUMMARY, RunFolder, checkpoints, step_of
from qsvd.training.steps import Step, TellSteps, memory_by_item, peak_bytes_of, planned_by_item
from qsvd.training.trainer import make_trainer

Tell = Callable[[Step], bool]  # True asks for a checkpoint and the end


@dataclass(frozen=True)
class Peak:
    """Most bytes at any time, and those of the process before the model came (0 for a GPU)."""

    bytes: int
    libraries: int


def train(options: Train) -> Path:
    """Train as `qsvd train` does, silently; the folder of the run.

    Raises:
        ValueError: an option, the base or the data is not usable.
        TrainingStopped: the start is absurd, or the loss no number.
        DoesNotFit: the device has too little memory.
    """
    job = prepare_run(options)
    with RunFolder(job.out, job.identity, resume=options.resume) as folder:
        if folder.summary is None:
            with quiet():
                _train(job, folder, lambda _: False)
    return job.out


def main(options: Train) -> None:
    """Run from the command line: progress on stderr, the summary on stdout.

    Raises:
        Interrupted: after Ctrl-C; a checkpoint was saved.
    """
    job = prepare_run(options)
    if options.preview:
        Console().print(preview(job.data, job.tokenizer), soft_wrap=True)
        return
    if options.dry_run:
        _show_plan(job)
        return
    _say_what_is_left_out(job)
    with RunFolder(job.out, job.identity, resume=options.resume) as folder:
        if folder.summary is not None:
            print(f"{job.out} was complete already", file=sys.stderr)
        else:
            _train_watched(job, folder)
        summary = folder.summary
    assert summary is not None, "written at the end of a run"
    Console().print(training_tables(RunSummary(**summary)))
    print(f"\n{job.out}")


def _train_watched(job: RunJob, folder: RunFolder) -> None:
    before = _resumed(job, folder)[1]
    with StopRequest("step") as stop, watching_steps(_total_steps(job), before) as show, quiet():

        def tell(step: Step) -> bool:
            show(step)
            return stop.made

        _train(job, folder, tell)
    if folder.summary is None:
        raise Interrupted(f"interrupted; the last step is saved, the same command with --resume goes on in {job.out}")


def _train(job: RunJob, folder: RunFolder, tell: Tell) -> None:
    """Load, train from where the folder is, and finish if nobody stops it."""
    checkpoint, before = _resumed(job, folder)
    kept = folder.keep_steps(before.number if before else 0)
    torch.manual_seed(job.options.seed)
    _keep_to(job)
    peak_bytes = peak_bytes_of(job.device)
    libraries = 0 if job.device.type == "cuda" else peak_bytes()
    try:
        model = load(
            job.split.folder,
            options=job.adapter_options,
            labels=job.data.label_names,
            device=job.device,
            dtype=job.dtype,
            placement=job.placed.placement,
        )
        if folder.start is None or checkpoint is None:
            folder.write(START, _held_out(job, model, "before"))
        trainer = _trainer(job, model, is_new=checkpoint is None)
        started, earlier = time.monotonic(), kept[-1].seconds if kept else 0.0
        stopped = False

        def note(step: Step) -> bool:
            nonlocal stopped
            folder.add_step(step)
            stopped = tell(step)
            return stopped

        trainer.add_callback(TellSteps(note, lambda: earlier + time.monotonic() - started, peak_bytes))
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if stopped and trainer.state.global_step < trainer.state.max_steps:
            return
        _finish(job, folder, trainer, Peak(peak_bytes(), libraries))
    except torch.OutOfMemoryError as error:
        raise _too_little_memory(job, str(error).partition("\n")[0]) from error
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror or error}; {_what_is_saved(job)}", error.filename) from error


def _keep_to(job: RunJob) -> None:
    """Take no more of a GPU than was asked for."""
    limit = job.placed.memory.limits.gpu
    if job.options.gpu is not None and limit is not None:
        total = torch.cuda.get_device_properties(job.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), job.device)


def _resumed(job: RunJob, folder: RunFolder) -> tuple[Path | None, Step | None]:
    """The checkpoint to go on from, and its step."""
    whole = checkpoints(job.out)
    steps = {step.number: step for step in folder.steps()}
    found = [checkpoint for checkpoint in whole if step_of(checkpoint) in steps]
    return (found[-1], steps[step_of(found[-1])]) if found else (None, None)


def _trainer(job: RunJob, model: Any, *, is_new: bool) -> Any:
    compared = None if job.options.any_start or not is_new else job.split
    return make_trainer(model, job.tokenizer, job.data.as_dataset(), job.settings, job.out, compared)


def _total_steps(job: RunJob) -> int:
    """Optimizer steps of the whole run; with packing an upper bound, since only the trainer packs."""
    if job.settings.steps:
        return job.settings.steps
    batches = math.ceil(len(job.data.input_ids) / job.settings.batch_size)
    return math.ceil(math.ceil(batches / job.settings.accumulate) * job.settings.epochs)


def _held_out(job: RunJob, model: Any, when: str) -> dict[str, float | None]:
    """Loss on what is held out, and accuracy of a classifier."""
    found: dict[str, float | None] = {f"held_out_{when}": None, f"accuracy_{when}": None}
    if job.held_out is None:
        return found
    model.eval()
    batch, pad, segments = job.settings.batch_size, job.tokenizer.pad_token_id, job.held_out.token_types
    examples: list[Any] = list(zip(job.held_out.input_ids, job.held_out.labels, strict=True))
    if job.data.label_names:
        model.config.pad_token_id = pad  # decoders find the end of a text by it
        measured = accuracy(model, examples, pad_token=pad, batch=batch, segments=segments)
        return {f"held_out_{when}": measured.nats, f"accuracy_{when}": measured.share}
    return found | {f"held_out_{when}": mean_loss(model, examples, pad_token=pad, batch=batch).nats}


def _finish(job: RunJob, folder: RunFolder, trainer: Any, peak: Peak) -> None:
    """The adapter, the summary, the pictures and the README; the summary last, since it says that all is there."""
    model = trainer.model
    model.save_pretrained(job.out)
    steps = folder.steps()
    summary = RunSummary(
        base=str(job.options.base),
        method=job.record.method,
        learning_rate=job.settings.learning_rate,
        optimizer=job.settings.optimizer,
        trained_parameters=sum(p.numel() for p in trained(model).values()),
        steps=len(steps),
        tokens=steps[-1].tokens,
        seconds=steps[-1].seconds,
        first_loss=steps[0].loss,
        last_loss=steps[-1].loss,
        memory=memory_by_item(model, trainer.optimizer, peak.bytes, peak.libraries),
        planned=planned_by_item(job.placed.memory, on_gpu=job.device.type == "cuda", libraries=peak.libraries),
        resident=job.resident,
        moved_bytes=moved_bytes(model),
        device=str(job.device),
        **(folder.start or {}),
        **_held_out(job, model, "after"),
    )
    before, after = summary.held_out_before, summary.held_out_after
    held_out = None if before is None or after is None else (before, after)
    for kind in ("png", "svg"):
        with whole_file(job.out / f"loss.{kind}") as file:
            file.write(loss_plot([step.loss for step in steps], held_out, summary.method, kind))
    write_text(job.out / "README.md", run_readme(summary, str(job.options.out)))
    folder.write(SUMMARY, asdict(summary))


def _what_is_saved(job: RunJob) -> str:
    saved = checkpoints(job.out)
    if not saved:
        return "nothing was saved yet"
    return f"{saved[-1].name} is kept, and the same command with --resume goes on from it"


def _too_little_memory(job: RunJob, reason: str) -> DoesNotFit:
    used, total = 0, 0
    if job.device.type == "cuda":
        total = torch.cuda.get_device_properties(job.device).total_memory
        used = torch.cuda.memory_allocated(job.device)
    return DoesNotFit(memory_advice(reason, job.settings, used=used, total=total))


def _show_plan(job: RunJob) -> None:
    table = Table("what would be trained", "", title_justify="left")
    for name, value in asdict(job.settings).items():
        table.add_row(name.replace("_", "-"), str(value))
    table.add_row("method", job.record.method)
    table.add_row("adapter dtype", job.record.dtype)
    table.add_row("device", f"{job.device}, {job.dtype}")
    table.add_row("sequences", f"{len(job.data.input_ids):,} with {job.data.num_tokens:,} tokens")
    table.add_row("trained tokens", f"{job.data.num_trained:,}")
    table.add_row("held out", f"{len(job.held_out.input_ids) if job.held_out else 0:,} sequences")
    table.add_row("steps", f"{_total_steps(job):,}" + (" at most" if job.settings.packing else ""))
    table.add_row("4-bit weights on the device", job.resident)
    place: Literal["gpu", "host"] = "gpu" if job.device.type == "cuda" else "host"
    limit = getattr(job.placed.memory.limits, place)
    table.add_row("memory, beside the libraries'", f"{show_size(job.placed.memory.total(place))} of {show_size(limit)}")
    Console().print(table)


def _say_what_is_left_out(job: RunJob) -> None:
    if job.data.truncated:
        dropped = f", {job.data.dropped} of them left out, since no trained token remained" if job.data.dropped else ""
        print(f"{job.data.truncated} examples were cut at {job.settings.max_length} tokens{dropped}", file=sys.stderr)
