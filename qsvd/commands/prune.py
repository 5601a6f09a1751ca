"""`qsvd prune`: a 16-bit model without some channels of its MLPs, to train a LoRA on (LoRAM, arXiv:2502.13533)."""

import sys

from qsvd.console.progress import quiet, say, watched
from qsvd.export.trained import disk_bytes
from qsvd.options import Prune
from qsvd.prepare.using.prune import PruneRun, prepare_prune
from qsvd.prune.folder import Pruned, PruneFolder, write_pruned_model
from qsvd.records import Progress, ShowProgress, show_nothing
from qsvd.report.next_commands import after_prune, last_lines
from qsvd.report.results import PruneResult


def main(options: Prune) -> None:
    """Run `qsvd prune`: 1 check, 2 choose channels and write the model, 3 print what is left.

    Raises:
        Interrupted: after Ctrl-C; finished work is kept.
    """
    with quiet():
        run = prepare_prune(options)
        with watched("MLP", f"finished work is kept, the same command continues for {run.out}") as show:
            result, is_new = _pruned(run, show)
    if not is_new:
        say(f"{run.out} was complete already", file=sys.stderr)
    mlps = run.pruning.mlps
    say(
        f"{result.kept} of {result.channels} channels kept in each of {len(mlps.blocks)} MLPs ({mlps.option}, a "
        f"multiple of {run.multiple}); {result.kept_parameters:,} of {result.parameters:,} parameters\n{run.out}"
    )
    say(last_lines("a pruned 16-bit model", options.out, after_prune(options)), file=sys.stderr)


def prune(options: Prune, show: ShowProgress = show_nothing) -> PruneResult:
    """Prune a model as `qsvd prune` does, silently, and return its folder.

    Raises:
        BadInput: an option or the 16-bit model cannot be used.
        DoesNotFit: the files do not fit on the disk.
    """
    with quiet():
        return _pruned(prepare_prune(options), show)[0]


def _pruned(run: PruneRun, show: ShowProgress) -> tuple[PruneResult, bool]:
    """Return the pruned model, and whether it was not there already."""
    total, copied = len(run.pruning.mlps.blocks), run.pruning.checkpoint.other_files
    num_bytes = disk_bytes(run.pruning.new_tensors()) + sum(file.stat().st_size for file in copied)
    with PruneFolder(run.out, run.identity, num_bytes) as folder:
        is_new = not folder.is_complete
        if is_new:
            write_pruned_model(
                run.pruning,
                folder,
                run.shard_bytes,
                lambda number: show(Progress(number, number, total, f"{number}/{total} MLPs")),
            )
        found = folder.result(Pruned)
    return PruneResult(run.out, found.channels, found.kept, found.parameters, found.kept_parameters), is_new
