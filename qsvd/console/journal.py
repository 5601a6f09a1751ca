"""What a training run shows and keeps: its plan, its steps, its summary, and a sentence where it fails."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from qsvd.adapters.methods.table import export_refusal
from qsvd.adapters.model import is_sharded, moved_bytes, restore, trained
from qsvd.console.progress import say
from qsvd.console.texts import texts_after, texts_before
from qsvd.data.encoder_decoder import sources_and_targets
from qsvd.errors import BadInput, Damaged, DoesNotFit, QsvdError, TrainingStopped, listing
from qsvd.evaluate.accuracy import accuracy, mean_loss
from qsvd.evaluate.written import written_loss
from qsvd.export.hub import named_base, upload, uploaded_name
from qsvd.export.peft import peft_adapter, write_adapter_files
from qsvd.export.trained import take_inventory
from qsvd.files.adapter import FINGERPRINT, open_adapter
from qsvd.files.atomic import write_text
from qsvd.files.layout import ADAPTER_CONFIG
from qsvd.files.split_folder import SplitFolder
from qsvd.files.trained.records import STEPS, read_identity, read_texts, shown_in
from qsvd.files.workspace import REPORT
from qsvd.prepare.models import open_trained
from qsvd.prepare.train import TrainRun
from qsvd.ranks import from_main
from qsvd.records import Progress, ShowProgress, Start, Step
from qsvd.report.card import base_of, card_header, origin_of
from qsvd.report.page.document import subject_page
from qsvd.report.page.run import RunRecords, run_subject
from qsvd.report.training import FORMS, RunSummary, run_readme
from qsvd.training.checkpoints import all_checkpoints, check_readable, checkpoints, step_of
from qsvd.training.guards import memory_advice
from qsvd.training.run_folder import START, RunFolder
from qsvd.training.steps import best_of, has_stalled, memory_by_item, peak_bytes_of, planned_by_item
from qsvd.training.together import is_lost, over_all


class RunRecorder:
    """Writes every step into the run's folder, shows it, and passes on the wish to stop.

    Args:
        show: Shows progress.
        is_stop_asked: Whether the run is to end after the step that is recorded.
    """

    def __init__(self, run: TrainRun, folder: RunFolder, show: ShowProgress, is_stop_asked: Callable[[], bool]):
        self._run, self._folder, self._show, self._is_stop_asked = run, folder, show, is_stop_asked
        self.checkpoint, self._before = resume_point(run.out, folder)
        self._steps = folder.keep_steps(self._before.number if self._before else 0)
        self._started = self._opened = time.monotonic()
        self.first_step_seconds: float | None = None
        self.peak_bytes = peak_bytes_of(run.device)
        self.library_bytes = 0 if run.device.type == "cuda" else self.peak_bytes()  # of a process without a model
        self.is_stopped = False

    def start_clock(self) -> None:
        """Count seconds from here; those of an earlier part of the run are added."""
        self._started = time.monotonic()

    def seconds(self) -> float:
        """Return the seconds of training, earlier parts of the run included."""
        return (self._before.seconds if self._before else 0.0) + time.monotonic() - self._started

    def record(self, step: Step) -> tuple[bool, bool]:
        """Write and show a step; return whether the run is to save a checkpoint, and whether it is to end."""
        if self.first_step_seconds is None:
            self.first_step_seconds = round(time.monotonic() - self._opened, 3)
        self._folder.add_step(step)
        self._steps.append(step)
        self._show(progress_of(step, self._run.total_steps, self._before))
        self.is_stopped = any(over_all([self._is_stop_asked()], self._run.device))
        ends = self.is_stopped or self.has_stalled
        return ends or self.best == step.number, ends

    @property
    def best(self) -> int | None:
        """The step with the lowest held-out loss, whose checkpoint is kept; None without --keep-best."""
        best = best_of(self._steps) if self._run.options.keep_best else None
        return None if best is None else best.number

    @property
    def has_stalled(self) -> bool:
        """Whether --early-stopping ends the run: its last measurements are not below the lowest one."""
        patience = self._run.options.early_stopping
        return patience is not None and has_stalled(self._steps, patience)


class Follower:
    """Stands for the recorder in the other processes of a run: it writes and shows nothing."""

    checkpoint: Path | None = None  # the first process knows it
    best: int | None = None
    has_stalled = is_stopped = False

    def __init__(self, device: torch.device, is_stop_asked: Callable[[], bool]):
        self._device, self._is_stop_asked = device, is_stop_asked
        self.peak_bytes = peak_bytes_of(device)

    def start_clock(self) -> None:
        """Count no seconds."""

    def seconds(self) -> float:
        """Return 0: the first process counts."""
        return 0.0

    def record(self, step: Step) -> tuple[bool, bool]:
        """Pass on the wish to stop."""
        del step
        self.is_stopped = any(over_all([self._is_stop_asked()], self._device))
        return self.is_stopped, self.is_stopped


def progress_of(step: Step, total: int, before: Step | None) -> Progress:
    """Return a step as progress; speed and time left are those since `before`, the last step of an earlier part."""
    tokens, seconds, number = (before.tokens, before.seconds, before.number) if before else (0, 0.0, 0)
    elapsed = max(step.seconds - seconds, 1e-9)
    speed = (step.tokens - tokens) / elapsed
    what = f"step {step.number}/{total}, loss {step.loss:.4f}, {speed:,.0f} tokens/s"
    if step.held_out is not None:
        what += f", held-out loss {step.held_out:.4f}"
    peak = f"peak {step.peak_bytes / 1e9:.2f} GB"
    return Progress(step.number, step.number - number, total, what, more=peak, seconds=elapsed)


def resume_point(run: Path, folder: RunFolder) -> tuple[Path | None, Step | None]:
    """Return the newest whole checkpoint whose step was recorded, and that step; None and None without one.

    A checkpoint that is damaged, or whose step was not recorded, is named, and the one before it is taken.

    Raises:
        Damaged: there are checkpoints, and none can be taken.
    """
    steps = {step.number: step for step in folder.steps()}
    faults: list[str] = []
    for checkpoint, lacking in reversed(all_checkpoints(run)):
        if lacking:
            faults.append(f"{checkpoint} lacks {listing(lacking)}")
            continue
        if step_of(checkpoint) not in steps:
            faults.append(f"{folder.folder / STEPS} lacks the step of {checkpoint.name}")
            continue
        try:
            check_readable(checkpoint, sealed=folder.is_sealed)
        except Damaged as error:
            faults.append(str(error))
            continue
        for fault in faults:
            say(f"{fault}; the run goes on from {checkpoint.name}", file=sys.stderr)
        return checkpoint, steps[step_of(checkpoint)]
    if faults:
        raise Damaged(f"{'; '.join(faults)}; no other checkpoint is left: give --out another folder")
    return None, None


def measure_start(run: TrainRun, model: Any, folder: RunFolder | None) -> None:
    """Write the loss on the held-out examples before the first step, and a few texts of the model.

    All processes measure a model that they share.
    """
    if folder is not None or is_sharded(model):
        found = held_out_loss(run, model, "before")
        if folder is not None:
            folder.write(START, found)
            folder.write_texts(texts_before(run, model))


def held_out_loss(run: TrainRun, model: Any, when: str) -> dict[str, float | None]:
    """Return the loss on the held-out examples, and the accuracy of a classifier, under the names of the summary.

    Args:
        when: "before" or "after".

    Raises:
        TrainingStopped: the loss is NaN or infinite.
    """
    found = _held_out_loss(run, model, when)
    loss = found[f"held_out_{when}"]
    if loss is not None and not isfinite(loss):
        raise TrainingStopped(
            f"the held-out loss is {loss}: numbers of the model are NaN or infinite, or overflow while it runs; lower "
            "--learning-rate, give --dtype float32, or check the files of the quantized model"
        )
    return found


def _held_out_loss(run: TrainRun, model: Any, when: str) -> dict[str, float | None]:
    found: dict[str, float | None] = {f"held_out_{when}": None, f"accuracy_{when}": None}
    data, held_out = run.data, run.data.held_out
    if held_out is None:
        return found
    model.eval()
    batch, pad, segments = run.settings.batch_size, data.tokenizer.pad_token_id, held_out.token_types
    examples: list[Any] = list(zip(held_out.input_ids, held_out.labels, strict=True))
    if data.train.label_names:
        measured = accuracy(model, examples, pad_token=pad, batch=batch, segments=segments)
        return {f"held_out_{when}": measured.nats, f"accuracy_{when}": measured.share}
    collate = None if held_out.media is None else held_out.media.batch
    if data.is_encoder_decoder:
        pairs = sources_and_targets(held_out, data.tokenizer)
        written = written_loss(model, *pairs, pad_token=pad, batch=batch, collate=collate)
        return found | {f"held_out_{when}": written.nats}
    return found | {f"held_out_{when}": mean_loss(model, examples, pad_token=pad, batch=batch, collate=collate).nats}


def finish_run(run: TrainRun, folder: RunFolder, trainer: Any, recorder: RunRecorder) -> None:
    """Write the adapter, pictures, README and summary; the summary last, since it says that the run is complete."""
    model, steps, libraries = trainer.model, folder.steps(), recorder.library_bytes
    wrong = [name for name, value in trained(model).items() if not value.isfinite().all()]
    if wrong:
        raise TrainingStopped(
            f"after the last step {len(wrong)} trained tensors are NaN or infinite ({listing(wrong)}); lower "
            "--learning-rate, and give --out another folder"
        )
    peak = recorder.peak_bytes()
    number = recorder.best or len(steps)
    found = {"held_out_after": steps[number - 1].held_out, "accuracy_after": None}
    known = found["held_out_after"] is not None and not run.data.train.label_names
    if trainer.is_sharded:
        from_main(lambda: [recorder.best, known])  # see `follow_end`
    if recorder.best is not None:
        restore(model, open_adapter(run.out / f"checkpoint-{number}"))
    model.save_pretrained(run.out)
    write_peft_files(run.out, run.split)
    summary = RunSummary(
        base=str(run.options.base),
        method=run.record.method,
        learning_rate=run.settings.learning_rate,
        optimizer=run.settings.optimizer,
        trained_parameters=sum(p.numel() for p in trained(model).values()),
        steps=len(steps),
        tokens=steps[-1].tokens,
        seconds=steps[-1].seconds,
        first_loss=steps[0].loss,
        last_loss=steps[-1].loss,
        memory=memory_by_item(model, trainer.optimizer, peak, libraries),
        planned=planned_by_item(run.placed.memory, on_gpu=run.device.type == "cuda", libraries=libraries),
        resident=run.resident,
        activations=run.activations,
        moved_bytes=moved_bytes(model),
        device=str(run.device),
        best_step=recorder.best,
        held_out_examples=len(run.data.held_out.input_ids) if run.data.held_out else None,
        classes=len(run.data.train.label_names),
        first_step_seconds=recorder.first_step_seconds,
        **asdict(folder.start or Start()),
        **(found if known else held_out_loss(run, model, "after")),
    )
    texts = texts_after(run, model, read_texts(run.out))
    folder.write_texts(texts)
    records = RunRecords(folder.start, steps, summary, *shown_in(read_identity(run.out)), texts)
    write_text(run.out / REPORT, subject_page(run_subject(run.out.resolve().name, records)))
    write_text(run.out / "README.md", _card(run, summary) + _readme(summary, str(run.options.out)))
    folder.finish(summary)


def follow_end(run: TrainRun, model: Any) -> None:
    """Do in another process what the first one needs at the end of a run with a model that all of them share."""
    best, known = from_main(lambda: [None, True])
    if best is not None:
        restore(model, open_adapter(run.out / f"checkpoint-{best}"))
    if not known:
        held_out_loss(run, model, "after")


def _card(run: TrainRun, summary: RunSummary) -> str:
    """Return the header of RUN/README.md, which is a model card."""
    split = run.split
    name = uploaded_name(split.folder) or base_of(split.folder)
    origin = origin_of(split.folder, name, split.manifest["source"]["architecture"])
    if run.data.train.label_names:
        origin["pipeline_tag"] = "text-classification"
    library = "peft" if (run.out / ADAPTER_CONFIG).is_file() else "qsvd"
    return card_header(origin, "adapter", library, [summary.method])


def _readme(summary: RunSummary, name: str) -> str:
    """Return RUN/README.md with the forms that the method can be exported in."""
    return run_readme(summary, name, [form for form in FORMS if export_refusal(summary.method, form) is None])


def push_run(run: TrainRun, summary: RunSummary, name: str) -> str:
    """Upload a complete run, with a card for the Hub. Return the address of the repository."""
    base, short = uploaded_name(run.split.folder), name.rpartition("/")[2]
    lines, there = [f"hf download {name} --local-dir {short}"], summary.base
    if base is None:
        note = f"Upload the quantized model too: `qsvd quantize ... --out {summary.base} --push-to-hub NAME`."
        say(f"the quantized model of this run is not on the Hub as far as is known. {note}", file=sys.stderr)
    else:
        there = base.rpartition("/")[2]
        lines.append(f"hf download {base} --local-dir {there}")
    text = _readme(replace(summary, base=there), short)
    get = "\n".join(["## Download", "", "```sh", *lines, "```", ""])
    replaced = {"README.md": f"{_card(run, summary)}{text}\n{get}"}
    return upload(run.out, name, replaced | named_base(run.out, base))


def write_peft_files(out: Path, split: SplitFolder) -> None:
    """Write the adapter of a run as PEFT reads it over the quantized model, if PEFT has a form for it."""
    opened = open_trained(out, split.folder)
    if refusal := export_refusal(opened.record.method, "peft"):
        say(f"{out} has no files for PEFT: {refusal}", file=sys.stderr)
        return
    model, base = opened.trained, str(split.folder.resolve())
    try:
        inventory = take_inventory(model)
        new, config, _ = peft_adapter(model, inventory, base=base, task=opened.task, dtype=torch.float32)
        write_adapter_files(out, new, config, {FINGERPRINT: split.fingerprint})
    except BadInput as error:
        say(f"{out} has no files for PEFT: {error}", file=sys.stderr)


@contextmanager
def explained_errors(run: TrainRun) -> Iterator[None]:
    """Turn errors of memory and disk into a sentence that says what to change and what is kept."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        used, total = 0, 0
        if run.device.type == "cuda":
            total = torch.cuda.get_device_properties(run.device).total_memory
            used = torch.cuda.memory_allocated(run.device)
        reason = str(error).partition("\n")[0]
        raise DoesNotFit(memory_advice(reason, run.settings, used=used, total=total)) from error
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror or error}; {_kept(run)}", error.filename) from error
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise QsvdError(f"another process of the run ended; {_kept(run)}") from error


def _kept(run: TrainRun) -> str:
    """Return in words what a run that failed has saved."""
    saved = checkpoints(run.out)
    return f"{saved[-1].name} is kept, and the same command continues from it" if saved else "nothing was saved yet"
