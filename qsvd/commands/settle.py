"""From a request of `qsvd quantize` to a job: what every weight gets, by a budget, a table, or alike for all."""

from pathlib import Path

from qsvd.checkpoint.read import Checkpoint
from qsvd.checkpoint.whole_file import write_text
from qsvd.checkpoint.write import MANIFEST, UNFINISHED, OutputFolder
from qsvd.commands.allocate import execute
from qsvd.commands.job import ALLOCATION, Job, check_room, job_of
from qsvd.commands.prepare import Source, Table, prepare_source
from qsvd.commands.prepare_allocate import is_sealed, prepare_allocate, sealed
from qsvd.commands.watch_measuring import Progressed, ShowProgress
from qsvd.options import Allocate, Quantize
from qsvd.plan.allocation import from_text, to_text


def prepare(options: Quantize, checkpoint: Checkpoint | None = None) -> Job:
    """A job, silently; with a budget that takes a pass over all weights, and writes to the folder of the result.

    Args:
        checkpoint: An open one; None opens options.model.

    Raises:
        ValueError, DoesNotFit: as from `prepare_source` and `settled`.
    """
    return settled(prepare_source(options, checkpoint), _silent)


def settled(source: Source, show: ShowProgress) -> Job:
    """The job of a request.

    With a budget the weights are measured first. Measurements, and the table that comes of them, stay in the folder of
    the result: a run that was stopped goes on with the same table.

    Args:
        show: Is told after every measured weight; what it raises ends the work, and measured weights stay.

    Raises:
        ValueError: the budget, or the folder, is not usable.
        DoesNotFit: the largest weight cannot be measured in the memory that is free.
    """
    if source.options.budget is None:
        return job_of(source, source.table)
    unfinished = source.out / UNFINISHED / ALLOCATION
    job = None
    if not unfinished.is_file() and not (source.out / MANIFEST).is_file():
        job = prepare_allocate(_questions(source, unfinished), source.checkpoint, source.plan)
        check_room(source.out, _most_bytes(source, job.task.budget.num_bytes))  # both before the folder is made
    with OutputFolder(source.out, source.identity) as folder:
        kept = source.out / ALLOCATION if folder.is_complete else unfinished
        if job is not None and not folder.is_complete:
            allocation = execute(job, show).allocation
            write_text(kept, sealed(to_text(allocation, source.plan.weights, source.recipe.dtype.itemsize)))
        text = kept.read_text(encoding="utf-8")
        if not folder.is_complete and not is_sealed(text):
            raise ValueError(
                f"{kept} was edited, and weights may be split already by what it said; copy it, and give it as "
                "--allocation with another --out"
            )
    return job_of(source, Table(from_text(text, source.plan.weights, str(kept)), text))


def _most_bytes(source: Source, budget: int) -> int:
    """On the disk at any moment: all of the budget there twice at worst, and what is copied."""
    split = {spec.name for spec in source.plan.weights}
    return 2 * budget + sum(t.num_bytes for name, t in source.checkpoint.tensors.items() if name not in split)


def _questions(source: Source, file: Path) -> Allocate:
    """What `qsvd allocate` would have been asked."""
    options = source.options
    assert options.budget is not None, "the caller looked"
    return Allocate(
        options.model,
        budget=options.budget,
        out=file,
        allocator=options.allocator,
        objective=options.objective,
        statistics=options.statistics,
        rank=options.rank,
        dtype=options.dtype,
        device=options.device,
        seed=options.seed,
    )


def _silent(done: Progressed) -> None:
    del done
