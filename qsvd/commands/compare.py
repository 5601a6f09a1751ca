"""`qsvd compare`: splits and adapter methods at their best learning rates, over seeds, on a test part.

Every number depends on the key of its cell alone (training/cells.py), so that stopped, repeated and shared comparisons
end with the same results.
"""

import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qsvd.commands.quantize import quantize_run
from qsvd.commands.train import train_run
from qsvd.console.cells import CellTrainer, interrupted, runs_folder
from qsvd.console.progress import StopRequest, display, quiet, say
from qsvd.errors import BadInput
from qsvd.files.atomic import Lock, record_text, whole_file, write_text
from qsvd.files.workspace import REPORT
from qsvd.options import Compare
from qsvd.prepare.comparing.compare import CompareRun, LeftOut, Row, prepare_compare
from qsvd.prepare.comparing.progress import estimate, finished, head_of, is_done, lacking, losses, row_result, wanted
from qsvd.prepare.comparing.rows import is_named
from qsvd.prepare.machine import train_machine
from qsvd.prepare.train import TrainRun, prepare_run
from qsvd.prepare.using.pages import RESULTS, subject_of
from qsvd.records import Progress, ShowProgress, show_nothing
from qsvd.report.comparison.plots import quality_plot, rates_plot
from qsvd.report.comparison.results import RowResult, with_statistics
from qsvd.report.comparison.table import comparison_table, planned_rows, result_lines
from qsvd.report.next_commands import last_lines
from qsvd.report.page.document import subject_page
from qsvd.report.results import CompareResult
from qsvd.training.cells import Cells
from qsvd.training.rates import best_rate
from qsvd.training.run_folder import RunFolder, Step

WAIT = 0.5  # seconds between two looks at work that another process does
CELLS = "cells"
TABLE, MACHINE = "table.md", "machine.jsonl"
PLOTS = {"quality.svg": quality_plot, "rates.svg": rates_plot}


def main(options: Compare) -> None:
    """Run `qsvd compare`: 1 check, 2 quantize, 3 train cell by cell (see `run_cells`), 4 print the table.

    Raises:
        Interrupted: after Ctrl-C; finished cells are kept.
    """
    if options.dry_run:
        _show_plan(options)
        return
    with quiet():
        run = prepare_compare(options)
    say(estimate(run, Cells(run.out / CELLS)), file=sys.stderr)
    with StopRequest("step") as stop, display() as show, quiet():
        _compared(run, show, lambda: stop.made)
    say((run.out / TABLE).read_text(encoding="utf-8"))
    say(last_lines("a comparison", options.out), file=sys.stderr)


def compare(options: Compare, show: ShowProgress = show_nothing) -> CompareResult:
    """Compare as `qsvd compare` does, silently, and return the rows with their numbers.

    Raises:
        BadInput: an option, the model or the data cannot be used.
        DoesNotFit: there is too little memory.
    """
    with quiet():
        run = prepare_compare(options)
        return CompareResult(run.out, tuple(_compared(run, show, lambda: False)))


def _show_plan(options: Compare) -> None:
    """Print the rows and the number of cells; write nothing that stays."""
    with TemporaryDirectory() as home, quiet():
        run = prepare_compare(options, Path(home))
    rows = [
        (
            row.method.text,
            row.split_name,
            row.size.rank or row.size.stored_rank,
            row.size.parameters,
            row.size.num_bytes,
            row.rates,
        )
        for row in run.rows
    ]
    say(planned_rows(head_of(run), rows, [asdict(one) for one in run.left_out]))
    say(estimate(run, Cells(run.out / CELLS) if (run.out / CELLS).is_dir() else None))


def _compared(run: CompareRun, show: ShowProgress, is_stop_asked: Callable[[], bool]) -> list[RowResult]:
    """Do the work of a checked comparison, write its results, and return the rows."""
    cells = Cells(run.out / CELLS)
    _quantize(run, is_stop_asked)
    run, opened = _open(run, cells)
    run_cells(run, opened, CellTrainer(run, cells, is_stop_asked, _kept_run), show)
    return write_results(run, cells)


def _quantize(run: CompareRun, is_stop_asked: Callable[[], bool]) -> None:
    """Quantize the models, or wait for another process that does."""
    for folder, quantizing in run.quantizing.items():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _waited(run, folder.with_name(f"{folder.name}.lock"), is_stop_asked):
            quantize_run(quantizing, show_nothing)
        if is_stop_asked():
            raise interrupted(run)


def _waited(run: CompareRun, file: Path, is_stop_asked: Callable[[], bool] = lambda: False) -> Lock:
    """Return a lock when no other process holds it."""
    while True:
        try:
            return Lock(file, file.parent)
        except BadInput as error:
            if is_stop_asked():
                raise interrupted(run) from error
            time.sleep(WAIT)


def _open(run: CompareRun, cells: Cells) -> tuple[CompareRun, dict[int, TrainRun]]:
    """Return a checked run for every row that is not done; a row that cannot start is left out, or refused if named."""
    opened, failed, wrong = dict[int, TrainRun](), dict[int, LeftOut](), list[str]()
    for number, row in enumerate(run.rows):
        if not wanted(row, run.options.seeds, cells)[1]:
            continue
        options = replace(row.options, out=run.out / "runs" / "new", learning_rate=row.rates[0])
        try:
            opened[number] = prepare_run(options, train_machine(options), run.data, must_fit=True)
        except BadInput as error:
            failed[number] = LeftOut(row.split_name, row.method.text, str(error))
            if is_named(run.options, row.method):
                wrong.append(f"--methods {row.method.text!r}: {error}")
    if wrong:
        raise BadInput("; ".join(dict.fromkeys(wrong)))
    kept = [number for number in range(len(run.rows)) if number not in failed]
    found = {place: opened[number] for place, number in enumerate(kept) if number in opened}
    rows = tuple(run.rows[number] for number in kept)
    return replace(run, rows=rows, left_out=(*run.left_out, *failed.values())), found


def run_cells(run: CompareRun, opened: Mapping[int, TrainRun], trainer: CellTrainer, show: ShowProgress) -> None:
    """Train what is not done yet, until no row needs another cell; other processes may do the same in this folder.

    Args:
        opened: A checked run of each row that is not done, by its number from 0.

    Raises:
        Interrupted: finished cells are kept.
    """
    cells, new = trainer.cells, 0
    while needed := lacking(run, cells):
        before = new
        for number, cell, is_tested in needed:
            if trainer.is_stop_asked():
                raise interrupted(run)
            lock = cells.lock(cell)
            if lock is None:
                continue
            with lock:
                if not is_done(cells, cell, is_tested=is_tested):
                    trainer.train(opened[number], cell, is_tested=is_tested)
                    new += 1
            _remove_runs(run, run.rows[number], cells)
            done, left = sum(len(list(finished(run, row, cells))) for row in run.rows), len(lacking(run, cells))
            show(Progress(done, new, done + left, f"{done}/{done + left} cells, {cell.name}"))
        if new == before:
            time.sleep(WAIT)


def _remove_runs(run: CompareRun, row: Row, cells: Cells) -> None:
    """Remove the folders of runs of a sweep that are not needed any more: the best one is needed until it is tested."""
    if run.options.keep_runs:
        return
    results, _ = wanted(row, run.options.seeds, cells)
    best = best_rate(losses(results))
    for rate in results:
        cell = row.cell(rate, 0)
        if rate != best or cells.test(cell) is not None:
            shutil.rmtree(runs_folder(run, cell), ignore_errors=True)


def _kept_run(run: TrainRun, is_stop_asked: Callable[[], bool], steps: list[Step]) -> Any:
    """Train exactly as `qsvd train` does, with all files of a run."""
    with RunFolder(run.out, run.identity, resume=False, total=run.total_steps) as folder:
        model = train_run(run, folder, show_nothing, is_stop_asked)
        steps += folder.steps()
    return model


def write_results(run: CompareRun, cells: Cells) -> list[RowResult]:
    """Write results, table, plots, page and facts of the machine, and return the rows."""
    rows = with_statistics([row_result(run, number, row, cells) for number, row in enumerate(run.rows, 1)])
    head, left = head_of(run), [asdict(one) for one in run.left_out]
    facts = [
        {"row": number, "learning_rate": rate, "seed": seed, **cells.machine(cell)}
        for number, row in enumerate(run.rows, 1)
        for rate, seed, cell in finished(run, row, cells)
    ]
    with _waited(run, run.out / "lock"):
        write_text(run.out / RESULTS, result_lines(head, rows, left))
        for name, draw in PLOTS.items():
            with whole_file(run.out / name) as file:
                file.write(draw(rows))
        write_text(run.out / MACHINE, "".join(record_text(fact, indent=None) for fact in facts))
        write_text(run.out / TABLE, comparison_table(head, rows, left, [*PLOTS]))
        write_text(run.out / REPORT, subject_page(subject_of(run.out)))
    threads = {str(fact.get("threads")) for fact in facts}
    if len(threads) > 1:
        counts = ", ".join(sorted(threads))
        say(f"the cells ran with {counts} threads of torch: their last bits may differ", file=sys.stderr)
    return rows
