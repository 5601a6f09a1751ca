"""`qsvd allocate`: measure every weight with several codecs and ranks, solve for the best choices, write a table."""

import sys

from qsvd.console.progress import say, terminal, watched
from qsvd.files.atomic import Lock, write_text
from qsvd.files.source import Checkpoint
from qsvd.options import Allocate
from qsvd.plan.allocation import to_text
from qsvd.plan.solve import AllocationResult, relative
from qsvd.prepare.allocate import AllocateRun, check_replaceable, measure_and_solve, prepare_allocate, sealed
from qsvd.records import ShowProgress, show_nothing
from qsvd.report.allocation import allocation_tables
from qsvd.report.next_commands import after_allocate, last_lines
from qsvd.report.results import AllocateResult


def main(options: Allocate, checkpoint: Checkpoint | None = None) -> None:
    """Run `qsvd allocate`: 1 check, 2 measure and solve, 3 write the table, 4 print a summary.

    Args:
        checkpoint: An open one; None opens options.model.

    Raises:
        Interrupted: after Ctrl-C; the weights that are measured are kept.
    """
    run = prepare_allocate(options, checkpoint)
    if run.cut:
        say(run.cut, file=sys.stderr)
    with watched("weight", f"measured weights are kept in {run.costs}, the same command continues there") as show:
        result = write_allocation(run, show)
    terminal().print(allocation_tables(run.task, result), highlight=False)
    say(f"\n{run.out}")
    say(last_lines("an allocation", options.out, after_allocate(options)), file=sys.stderr)


def allocate(options: Allocate, show: ShowProgress = show_nothing) -> AllocateResult:
    """Choose bits and ranks as `qsvd allocate` does, silently, and return the file and what is in it.

    Raises:
        BadInput: an option, or the 16-bit model, cannot be used, or the budget cannot be met.
        DoesNotFit: a weight does not fit in memory.
    """
    run = prepare_allocate(options)
    result = write_allocation(run, show)
    expected = relative(result.squares, result.norms, [spec.module for spec in run.task.weights])
    return AllocateResult(run.out, result.allocation, result.num_bytes, expected)


def write_allocation(run: AllocateRun, show: ShowProgress) -> AllocationResult:
    """Do the work of a checked run: measure, solve, write the table."""
    run.out.parent.mkdir(parents=True, exist_ok=True)
    with Lock(run.out.with_name(f"{run.out.name}.lock"), run.out):
        check_replaceable(run)  # another process may have written the file before the lock was free
        result = measure_and_solve(run, show)
        write_text(run.out, sealed(to_text(result.allocation, run.task.weights, run.task.factor_bytes)))
    return result
