"""`qsvd aggregate`: the average of several runs on one quantized model, as a run."""

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from qsvd.adapters.methods.frozen import Frozen
from qsvd.adapters.start import read_components, start_adapter
from qsvd.console.journal import write_peft_files
from qsvd.console.progress import display, quiet, say, terminal
from qsvd.export.average import AggregateFolder, average
from qsvd.files.adapter import write_adapter
from qsvd.files.atomic import write_text
from qsvd.options import Aggregate
from qsvd.prepare.using.aggregate import AggregateRun, prepare_aggregate
from qsvd.records import Progress, ShowProgress, show_nothing
from qsvd.report.next_commands import after_train, last_lines
from qsvd.report.results import AggregateResult
from qsvd.report.training import aggregate_readme, aggregate_table

NUMBER_BYTES = 8  # of a parameter: float32 in the adapter, and again for PEFT


@dataclass(frozen=True)
class Averaged:
    """What is recorded of an average: its rank, and the relative errors of all layers and of each."""

    rank: int
    error: float
    errors: Mapping[str, float]


def main(options: Aggregate) -> None:
    """Run `qsvd aggregate`: 1 check, 2 average (see `write_average`), 3 print the errors of the rank."""
    with display() as show, quiet():
        run = prepare_aggregate(options)
        result, is_new = _aggregated(run, show)
    if not is_new:
        say(f"{run.out} was complete already", file=sys.stderr)
    terminal().print(aggregate_table(result.rank, result.error, result.errors))
    say(f"\n{run.out}")
    found = after_train(str(run.split.folder), options.out, None, generates=not run.record.labels, merges=True)
    say(last_lines("a run", options.out, found), file=sys.stderr)


def aggregate(options: Aggregate, show: ShowProgress = show_nothing) -> AggregateResult:
    """Average runs as `qsvd aggregate` does, silently, and return the new run.

    Raises:
        BadInput: an option or a run cannot be used.
        DoesNotFit: the files do not fit on the disk.
    """
    with quiet():
        return _aggregated(prepare_aggregate(options), show)[0]


def _aggregated(run: AggregateRun, show: ShowProgress) -> tuple[AggregateResult, bool]:
    """Return the average, and whether it was not there already."""
    elements = sum(sum(weight["shape"]) * min(run.rank, *weight["shape"]) for weight in run.split.weights.values())
    with AggregateFolder(run.out, run.identity, NUMBER_BYTES * elements) as folder:
        is_new = not folder.is_complete
        if is_new:
            folder.finish(asdict(write_average(run, show)))
        found = folder.result(Averaged)
    return AggregateResult(run.out, found.rank, found.error, found.errors), is_new


def write_average(run: AggregateRun, show: ShowProgress) -> Averaged:
    """Do the work of a checked run: 1 average weight by weight, 2 write the adapter, 3 write it for PEFT, and a README.

    Args:
        show: Is called after every weight.
    """
    tensors, squares = dict[str, Tensor](), dict[str, tuple[float, float]]()
    modules, total = run.runs[0].trained.modules(), len(run.split.weights)
    for number, name in enumerate(run.split.weights, start=1):
        made = start_adapter(run.split, run.record, name, torch.device("cpu"))
        if not isinstance(made, Frozen):
            rank = made.get_parameter("down").shape[0]
            values = [one.trained.read(name) for one in run.runs]
            found = average(values, run.shares, read_components(run.split, name), rank)
            up_OK, down_KI = (made.get_parameter(part).detach() for part in ("up", "down"))
            kept = len(found.down_KI)  # the other rows of A are as in a new LoRA, beside columns of zeros
            up_OK[:, :kept], down_KI[:kept] = found.up_OK, found.down_KI
            tensors |= {f"{modules[name]}.up": up_OK, f"{modules[name]}.down": down_KI}
            squares[run.split.weights[name]["module"]] = found.square, found.lost
        show(Progress(number, number, total, f"{number}/{total} weights"))
    for name, first in run.runs[0].trained.full.items():
        parts = zip(run.shares, (one.trained.full[name] for one in run.runs), strict=True)
        tensors[name] = sum((share * part.double() for share, part in parts), torch.zeros(())).to(first.dtype)
    adapter = run.runs[0].adapter
    write_adapter(run.out, run.record, tensors, None if adapter is None else adapter.chat_template)
    write_peft_files(run.out, run.split)
    errors = {module: _relative(*pair) for module, pair in squares.items()}
    all_of_them = (sum(part) for part in zip(*squares.values(), strict=True))
    averaged = Averaged(run.rank, _relative(*all_of_them), errors)
    readme = aggregate_readme(str(run.split.folder), averaged.rank, averaged.error, run.options.runs)
    write_text(run.out / "README.md", readme)
    return averaged


def _relative(square: float, lost: float) -> float:
    return (lost / square) ** 0.5 if square else 0.0
