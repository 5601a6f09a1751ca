"""`qsvd quantize`: one weight after another from the 16-bit model into OUT, then the files around them."""

import math
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from qsvd.commands.console import explained_disk_errors, watched
from qsvd.commands.report import load_report, show_report
from qsvd.decompose.alternate import split_weight
from qsvd.decompose.split import Split, measure
from qsvd.errors import BadInput, DoesNotFit
from qsvd.export.hub import named_base, open_repository, upload
from qsvd.files.atomic import read_object
from qsvd.files.quantize_folder import OutputFolder
from qsvd.files.source import Checkpoint, stream
from qsvd.files.workspace import MANIFEST, UNFINISHED
from qsvd.numerics.names import spelling
from qsvd.options import Quantize
from qsvd.plan.weights import WeightSpec
from qsvd.prepare.machine import seed_of
from qsvd.prepare.outputs import copied_tensor, error_change, parted_layers, tensors_of, write_outputs
from qsvd.prepare.quantize import QuantizeRun, check_resources, check_room, prepare_quantize, resolve_allocation
from qsvd.records import Progress, ShowProgress, WeightError, show_nothing
from qsvd.report.card import header_of
from qsvd.report.errors import from_record, to_record, totals_table
from qsvd.report.next_commands import after_quantize, last_lines
from qsvd.report.readme import readme
from qsvd.report.results import QuantizeResult
from qsvd.report.totals import totals


def main(options: Quantize, checkpoint: Checkpoint | None = None) -> None:
    """Run `qsvd quantize`: 1 check, 2 quantize (see `quantize_run`) and show progress, 3 report.

    Args:
        checkpoint: An open one; None opens options.model.

    Raises:
        Interrupted: after Ctrl-C; finished weights are kept.
    """
    run = prepare_quantize(options, checkpoint)
    if options.dry_run:
        check_room(run.out, run.sizes.disk)
        show_plan(run)
        return
    if warning := parted_layers(run):
        print(warning, file=sys.stderr)
    repository = open_repository(options)
    kept = f"finished work is kept, the same command continues in {run.out}"
    with explained_disk_errors(run.out / UNFINISHED, kept), watched("weight", kept) as show:
        is_new = quantize_run(run, show)
    if not is_new:
        print(f"{run.out} was complete already", file=sys.stderr)
    show_report(run.out, worst=5)
    print(f"\n{run.out}")
    print(last_lines("a quantized model", options.out, after_quantize(options.out)), file=sys.stderr)
    if repository is not None:
        print(push_quantized(run.out, repository))


def quantize(options: Quantize, show: ShowProgress = show_nothing) -> QuantizeResult:
    """Quantize a 16-bit model as `qsvd quantize` does, silently, and return the quantized model with its error.

    Raises:
        BadInput: an option, or the 16-bit model, cannot be used.
        DoesNotFit: there is too little memory or disk space.
        OSError: the folder cannot be written. Finished weights are kept, and the same call continues there.
    """
    run, repository = prepare_quantize(options), open_repository(options)
    quantize_run(run, show)
    url = None if repository is None else push_quantized(run.out, repository)
    _, errors = load_report(run.out)
    return QuantizeResult(run.out, tuple(errors), tuple(totals(errors)), url=url)


def push_quantized(folder: Path, name: str) -> str:
    """Upload a complete quantized model: its card and its adapter name the repository. Return its address."""
    header, errors = load_report(folder)
    manifest, config = (read_object(folder / file) for file in (MANIFEST, "config.json"))
    modules = [weight["module"] for weight in manifest["weights"].values()]
    architecture, table = manifest["source"]["architecture"], totals_table(header, errors)
    text = readme(header, name, architecture, config["quantization_config"], modules, table)
    replaced = {"README.md": header_of((folder / "README.md").read_text(encoding="utf-8")) + text}
    return upload(folder, name, replaced | named_base(folder, name))


def quantize_run(run: QuantizeRun, show: ShowProgress) -> bool:
    """Do the work of a checked run: 1 resources, 2 bits and ranks, 3 weight by weight, 4 the files around them.

    Args:
        show: Is called after every weight. What it raises ends the work: nothing is lost, and the same run continues
            there, to the same bytes.

    Returns:
        Whether there was anything to do.
    """
    check_resources(run)  # 1: before the folder is made
    with OutputFolder(run.out, run.identity) as folder:
        if folder.is_complete:
            return False
        if run.allocation is None:  # 2: a budget
            run = resolve_allocation(run, folder, show)
            check_resources(run)
        split_weights(run, folder, show)  # 3
        write_outputs(run, folder)  # 4
    return True


def split_weights(run: QuantizeRun, folder: OutputFolder, show: ShowProgress) -> None:
    """Split what is not split yet, and write every shard that is not there."""
    weights, errors, done, new = run.plan.weights, list[WeightError](), 0, 0
    pending = [number for shard in run.shards for number in shard.weights if not folder.is_done(number)]
    tensors = stream(run.checkpoint, [weights[number] for number in pending])
    for shard in run.shards:
        is_written = (run.out / shard.file).is_file()
        for number in shard.weights:
            num_bytes = math.prod(weights[number].shape) * run.checkpoint.dtype_of(weights[number]).itemsize
            if not folder.is_done(number):
                split, error = split_and_measure(run, weights[number], next(tensors))
                folder.save(number, *tensors_of(run, weights[number], split), to_record(error))
                new += num_bytes
            done += num_bytes
            errors.append(from_record(folder.weight_record(number)))
            what = f"{len(errors)}/{len(weights)} weights"
            show(Progress(done, new, run.sizes.source, what, ("MB/s", 1e6), error_change(errors)))
        if not is_written:
            folder.write_shard(shard.file, shard.weights, [copied_tensor(run, name) for name in shard.copied])


def split_and_measure(run: QuantizeRun, spec: WeightSpec, weight_OI: Tensor) -> tuple[Split, WeightError]:
    """Split one weight and measure its error; a DoesNotFit or a BadInput says why a weight cannot be split."""
    seed, objective = seed_of(run.options.seed, spec), run.objective(spec.module)
    try:
        weight_OI = weight_OI.to(run.device)
        split = split_weight(weight_OI, run.recipe(spec.module), seed=seed, objective=objective)
        return split, measure(weight_OI, split, name=spec.module, role=spec.role, seed=seed)
    except torch.OutOfMemoryError as error:
        raise DoesNotFit(
            f"{spec.name} {list(spec.shape)} needs about {16 * weight_OI.numel() / 1e9:.1f} GB on {run.device}; "
            "close other programs that use it, or give --device cpu"
        ) from error
    except ValueError as error:
        raise BadInput(f"{run.checkpoint.name}: {spec.name}: {error}; repair the checkpoint") from error


def show_plan(run: QuantizeRun) -> None:
    """Print to stdout what a run would do."""
    console = Console()
    options = Table("option", "value", title="Options", title_justify="left")
    for name, value in asdict(run.options).items():
        options.add_row(f"--{name.replace('_', '-')}", str(value))
    options.add_row("(device)", str(run.device))
    weights = Table("weight", "role", "shape", "codec", "rank", title="Weights", title_justify="left")
    for spec in run.plan.weights:
        choice = run.resolved.choices[spec.module]
        shape = f"{spec.shape[0]} x {spec.shape[1]}"
        weights.add_row(spec.module, spec.role, shape, spelling(choice.codec), str(choice.rank))
    sizes = Table("part", "MB", title="Sizes", title_justify="left")
    for name, num_bytes in (
        ("weights to quantize, in the 16-bit model", run.sizes.source),
        ("residual", run.sizes.residual),
        ("components", run.sizes.factors),
        ("copied", run.sizes.copied),
        ("maximum on disk during the run", run.sizes.disk),
    ):
        sizes.add_row(name, f"{num_bytes / 1e6:,.1f}")
    console.print(options, weights, sizes)
    console.print(f"Coverage: {run.header.reach}", soft_wrap=True, highlight=False)
    for left in run.header.coverage.left:
        console.print(f"Left: {left.pattern} ({left.size})", soft_wrap=True, highlight=False)
    shards = ", ".join(shard.file for shard in run.shards[:3]) + (" ..." if len(run.shards) > 3 else "")
    console.print(f"Files: {shards}", soft_wrap=True, highlight=False)
