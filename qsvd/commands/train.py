"""`qsvd train`: adapters next to the frozen residual, from a quantized model and data to a run.

examples/train_loop.py is the same in a plain PyTorch loop, without checkpoints and a plan of the memory.
"""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qsvd import ranks
from qsvd.adapters.methods.table import export_refusal
from qsvd.adapters.model import restore
from qsvd.commands import plan
from qsvd.commands.quantize import quantize_run, quantize_visibly
from qsvd.console.journal import (
    Follower,
    RunRecorder,
    explained_errors,
    finish_run,
    follow_end,
    held_out_loss,
    measure_start,
    push_run,
)
from qsvd.console.progress import StopRequest, display, quiet, say, terminal
from qsvd.data.masks import preview
from qsvd.errors import Interrupted
from qsvd.export.hub import open_repository
from qsvd.files.adapter import open_adapter
from qsvd.memory.device import limit_gpu_memory
from qsvd.options import Train
from qsvd.prepare.plan import plan_of
from qsvd.prepare.quantize_first import FirstRun, on_quantized, prepare_training
from qsvd.prepare.train import TrainRun, load_start
from qsvd.records import ShowProgress, show_nothing
from qsvd.report.next_commands import after_train, last_lines, repeating_command, train_command
from qsvd.report.results import TrainResult
from qsvd.report.training import training_tables
from qsvd.training.liger import use_liger
from qsvd.training.run_folder import RunFolder
from qsvd.training.steps import TellSteps
from qsvd.training.together import join_group
from qsvd.training.trainer import make_trainer


def main(options: Train) -> None:
    """Run `qsvd train`: 1 check, 2 quantize a 16-bit model, 3 train (see `train_run`), 4 print the summary.

    Raises:
        Interrupted: after Ctrl-C; a checkpoint was saved.
    """
    if options.dry_run and not options.preview:
        plan.main(plan_of(options), options)
        return
    checked = prepare_together(options)
    if options.preview:
        terminal().print(preview(checked.data.train, checked.data.tokenizer), soft_wrap=True)
        say(f"Next: {train_command(options)}", file=sys.stderr)
        return
    say("\n".join(checked.first_lines), file=sys.stderr)
    repository = ranks.from_main(lambda: open_repository(options))
    run = on_quantized(checked, quantize_visibly)
    with run_folder(run) as folder:
        if ranks.from_main(lambda: folder is not None and folder.summary is not None):
            say(f"{run.out} was complete already", file=sys.stderr)
        else:
            say(f"Memory: {run.activations}", file=sys.stderr)
            with StopRequest("step") as stop, display() as show, quiet():
                train_run(run, folder, show, lambda: stop.made)
        summary = None if folder is None else folder.summary
    if not ranks.from_main(lambda: summary is not None):
        raise Interrupted(f"interrupted; the last step is saved, the same command continues in {run.out}")
    if summary is None:
        return  # the first process says the rest
    terminal().print(training_tables(summary))
    say(f"\n{run.out}")
    generates, merges = not run.data.train.label_names, export_refusal(run.record.method, "merged") is None
    found = after_train(run.options.base, options.out, options.valid, generates=generates, merges=merges)
    say(last_lines("a run", options.out, found), file=sys.stderr)
    if repository is not None:
        say(push_run(run, summary, repository))


def prepare_together(options: Train) -> TrainRun | FirstRun:
    """Check a run in every process, the first one first; the others have its batches, which may depend on memory."""
    if ranks.is_main():
        checked = prepare_training(options)
        ranks.from_main(lambda: [checked.settings.batch_size, checked.settings.accumulate])
        return checked
    batch_size, accumulate = ranks.from_main(lambda: [0, 0])
    return prepare_training(replace(options, batch_size=batch_size, accumulate=accumulate, step_tokens=None))


def run_folder(run: TrainRun) -> RunFolder | nullcontext[None]:
    """Open the folder of a run, which the first process alone writes."""
    return _opened(run) if ranks.is_main() else nullcontext()


def _opened(run: TrainRun) -> RunFolder:
    command = repeating_command(run.options)
    return RunFolder(run.out, run.identity, resume=run.options.resume, total=run.total_steps, command=command)


def train(options: Train, show: ShowProgress = show_nothing) -> TrainResult:
    """Train as `qsvd train` does, silently, and return the run.

    Raises:
        BadInput: an option, the model or the data cannot be used.
        TrainingStopped: the first loss is too high, or a loss is NaN.
        DoesNotFit: there is too little memory.
    """
    ranks.check_alone("qsvd.train")
    checked, repository = prepare_training(options), open_repository(options)
    run = on_quantized(checked, lambda first: quantize_run(first, show))
    with _opened(run) as folder:
        if folder.summary is None:
            with quiet():
                train_run(run, folder, show, lambda: False)
        assert folder.summary is not None, "nothing asks it to stop"
        summary, losses = folder.summary, tuple(step.loss for step in folder.steps())
    url = None if repository is None else push_run(run, summary, repository)
    return TrainResult(run.out, losses, summary, url=url)


def train_run(run: TrainRun, folder: RunFolder | None, show: ShowProgress, is_stop_asked: Callable[[], bool]) -> Any:
    """Do the work of a checked run, and return the model: 1 load, 2 first loss, 3 train, 4 last loss, adapter, summary.

    Several processes do 3 together; the first one does 2 and 4, in which all measure a model that they share.

    Args:
        folder: None in the other processes.
        show: Is called after every step.
        is_stop_asked: Is asked after every step. True ends the run after a checkpoint, without a summary.
    """
    recorder = Follower(run.device, is_stop_asked) if folder is None else RunRecorder(run, folder, show, is_stop_asked)
    start = ranks.from_main(lambda: None if recorder.checkpoint is None else str(recorder.checkpoint))
    checkpoint, is_new = None if start is None else Path(start), start is None
    torch.manual_seed(run.options.seed)
    if run.options.gpu is not None:
        limit_gpu_memory(run.device, run.placed.memory.limits.gpu)
    with explained_errors(run):
        if run.placed.placement.shards:
            join_group(run.device)
        model = load_start(run, is_resumed=not is_new)  # 1
        use_liger(model)
        if ranks.from_main(lambda: folder is not None and (folder.start is None or is_new)):
            measure_start(run, model, folder)  # 2
        ranks.barrier()
        compared = None if run.options.any_start or not is_new else run.split
        trainer = make_trainer(model, run.data.tokenizer, run.data.dataset, run.settings, run.out, compared)
        trainer.add_callback(TellSteps(recorder.record, recorder.seconds, recorder.peak_bytes))
        trainer.best, trainer.eval_every = lambda: recorder.best, run.options.eval_every
        trainer.held_out = lambda: held_out_loss(run, model, "after")["held_out_after"]
        recorder.start_clock()
        if checkpoint is not None and ranks.from_main(lambda: recorder.has_stalled):
            restore(model, open_adapter(checkpoint))  # --early-stopping ended it before it was killed
        else:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))  # 3
        is_whole = not recorder.is_stopped or trainer.state.global_step >= trainer.state.max_steps
        if isinstance(recorder, RunRecorder) and folder is not None and is_whole:
            finish_run(run, folder, trainer, recorder)  # 4
        elif is_whole and trainer.is_sharded:
            follow_end(run, model)
    return model
