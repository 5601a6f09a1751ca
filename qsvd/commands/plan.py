"""`qsvd plan`: estimate GPU, CPU and disk memory before any work."""

import json
import sys
from contextlib import nullcontext

from qsvd.console.progress import display, quiet, say, terminal
from qsvd.errors import DoesNotFit
from qsvd.memory.duration import Rate, page_seconds, quantize_time, step_time
from qsvd.memory.gpus.strategies import INTERCONNECTS, Group, strategies
from qsvd.memory.other_tasks import plan_quantizing
from qsvd.memory.placement import Cell, Reach, advice, explore, highest, longest, place, place_serving
from qsvd.memory.split_model import SplitModelPlan
from qsvd.options import Plan, Train
from qsvd.options.quantizing import NEAREST_PASSES
from qsvd.prepare.plan import PlanJob, prepare_plan, train_of
from qsvd.records import Progress, ShowProgress, show_nothing
from qsvd.report.gpus.strategies import GpusAnswer, torchrun_command
from qsvd.report.next_commands import train_command
from qsvd.report.planning import Answer, QuantizeAnswer, ServeAnswer, TrainAnswer, headline, plan_json, plan_tables

RANKS = (16, 32, 64, 128)
LENGTHS = (1024, 2048, 4096, 8192, 16384)
GPUS = tuple(size * 10**9 for size in (8, 12, 16, 24, 48, 80))


def main(options: Plan, run: Train | None = None) -> None:
    """Print the plan to stdout, as tables or as JSON, and the command that trains.

    Args:
        run: That command; None makes it of the plan.

    Raises:
        BadInput: an option cannot be used, or the model cannot be planned.
        DoesNotFit: something does not fit; raised after the tables are printed.
    """
    with display() if options.explore else nullcontext(show_nothing) as show:  # all else takes seconds
        found = plan(options, show, run)
    if options.json:
        say(json.dumps(plan_json(options.model, found), indent=2))
    else:
        say(headline(found), flush=True)
        terminal().print(plan_tables(options.model, found))
    if not found.fits:
        raise DoesNotFit("; ".join(found.lacking))
    if options.rank != 0 and not options.json and (command := _next(options, found, run)):
        say(f"Next: {command}", file=sys.stderr)


def _next(options: Plan, found: Answer, run: Train | None) -> str | None:
    """Return the command that trains, if training is planned."""
    if found.gpus is not None and found.gpus.best is not None:
        return torchrun_command(train_of(options), found.gpus, found.gpus.best)
    return None if found.train is None else train_command(run or train_of(options))


def plan(options: Plan, show: ShowProgress = show_nothing, run: Train | None = None) -> Answer:
    """Plan as `qsvd plan` does, silently. What does not fit is in the answer; only bad input is raised."""
    with quiet(reads_data=options.data is not None):
        return answer(prepare_plan(options, run), show)


def answer(job: PlanJob, show: ShowProgress = show_nothing) -> Answer:
    """Plan every task that is asked for; `show` is called where that takes long."""
    model = job.model
    tasks = job.tasks
    batch, accumulate = job.training.batch, job.training.accumulate
    time = quantize_time(model, NEAREST_PASSES, job.speed)
    quantize = QuantizeAnswer(plan_quantizing(model, batch.device, job.limits), time)
    return Answer(
        quantize=quantize if "quantize" in tasks else None,
        train=_training(job, model) if "train" in tasks else None,
        serve=_serving(job, model) if "serve" in tasks else None,
        cells=_explored(job, show) if job.options.explore else (),
        blocks=len(model.blocks),
        speed=job.speed,
        what=f"rank {job.source.rank}, {batch.tokens:,} tokens, {batch.batch} x {accumulate} sequences a step",
        notes=job.source.notes,
        run=None if job.run is None else job.run.rows,
        gpus=None if job.options.gpus is None else _on_gpus(job, model, job.options.gpus),
    )


def _on_gpus(job: PlanJob, model: SplitModelPlan, gpus: int) -> GpusAnswer:
    given = job.options.interconnect
    interconnect = INTERCONNECTS[given] if isinstance(given, str) else Rate(1e9 * given, "given")
    group = Group(gpus, job.speed, interconnect)
    return GpusAnswer(strategies(model, job.training, job.limits, job.wish, group), group, job.training)


def _serving(job: PlanJob, model: SplitModelPlan) -> ServeAnswer:
    placed = place_serving(model, job.training.batch, job.limits)
    return ServeAnswer(placed, page_seconds(model, placed.placement, job.speed))


def _training(job: PlanJob, model: SplitModelPlan) -> TrainAnswer:
    limits, wish = job.limits, job.wish
    placed = place(model, job.training, limits, wish)
    reach = Reach(
        tokens=longest(model, job.training, limits, wish, job.context),
        rank=highest(job.source.make, job.training, limits, wish, job.source.most_rank),
    )
    step = step_time(model, job.training, placed.placement, job.speed)
    changes: tuple[str, ...] = ()
    if not placed.memory.fits:
        changes = advice(job.source.make, job.source.rank, job.training, limits, reach)
    elif not step.is_hidden and job.training.accumulate > 1 and not job.training.layer_major:
        changes = ("--layer-major copies the weights once per step, not once per batch",)
    return TrainAnswer(placed, reach, changes, step, job.training, job.steps)


def _explored(job: PlanJob, show: ShowProgress) -> tuple[Cell, ...]:
    ranks = [rank for rank in RANKS if rank <= job.source.most_rank] or [job.source.most_rank]
    if job.source.is_fixed:
        ranks = [job.source.rank]
    lengths = [length for length in LENGTHS if length <= job.context] or [job.context]
    cells = list[Cell]()
    for done, rank in enumerate(ranks, start=1):
        cells += explore(job.source.make, job.training, job.limits.host, [rank], lengths, GPUS)
        show(Progress(done, done, len(ranks), f"{done}/{len(ranks)} ranks"))
    return tuple(cells)
