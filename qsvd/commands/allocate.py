"""`qsvd allocate`: measure the candidates of every weight, solve for the best choices, write them as a table."""

from rich.console import Console

from qsvd.commands.console import StopRequest, watching
from qsvd.errors import Interrupted
from qsvd.files.atomic import write_text
from qsvd.files.source import Checkpoint
from qsvd.options import Allocate
from qsvd.plan.allocation import to_text
from qsvd.prepare.allocate import Progressed, execute, prepare_allocate, sealed
from qsvd.report.allocation import allocation_tables


def main(options: Allocate, checkpoint: Checkpoint | None = None) -> None:
    """Run from the command line: progress on stderr, the summary on stdout.

    Args:
        checkpoint: An open one; None opens options.model.

    Raises:
        Interrupted: after Ctrl-C; the weights that are measured are kept.
    """
    job = prepare_allocate(options, checkpoint)
    with StopRequest("weight") as stop, watching() as show:

        def show_or_stop(done: Progressed) -> None:
            show(done)
            if stop.made:
                raise Interrupted(
                    f"interrupted; measured weights are kept in {job.costs}, the same command goes on there"
                )

        result = execute(job, show_or_stop)
    write_text(job.out, sealed(to_text(result.allocation, job.task.weights, job.task.factor_bytes)))
    Console().print(allocation_tables(job.task, result), highlight=False)
    print(f"\n{job.out}")
