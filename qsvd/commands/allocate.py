"""`qsvd allocate`: measure every weight with several codecs and ranks, solve for the best choices, write a table."""

from rich.console import Console

from qsvd.commands.console import watched
from qsvd.files.atomic import write_text
from qsvd.files.source import Checkpoint
from qsvd.options import Allocate
from qsvd.plan.allocation import to_text
from qsvd.prepare.allocate import measure_and_solve, prepare_allocate, sealed
from qsvd.report.allocation import allocation_tables


def main(options: Allocate, checkpoint: Checkpoint | None = None) -> None:
    """Run `qsvd allocate`: 1 check, 2 measure and solve, 3 write the table, 4 print a summary.

    Args:
        checkpoint: An open one; None opens options.model.

    Raises:
        Interrupted: after Ctrl-C; the weights that are measured are kept.
    """
    run = prepare_allocate(options, checkpoint)
    with watched("weight", f"measured weights are kept in {run.costs}, the same command continues there") as show:
        result = measure_and_solve(run, show)
    write_text(run.out, sealed(to_text(result.allocation, run.task.weights, run.task.factor_bytes)))
    Console().print(allocation_tables(run.task, result), highlight=False)
    print(f"\n{run.out}")
