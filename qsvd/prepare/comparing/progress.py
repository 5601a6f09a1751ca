"""How far a comparison is: which cells are done, which are needed next, and the results so far.

Only the finished cells of a folder are read. What a row needs does not depend on who has trained what, or when.
"""

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from qsvd.prepare.comparing.compare import CompareRun, Row
from qsvd.report.comparison.results import Rate, RowResult, Seed
from qsvd.report.next_commands import compare_command
from qsvd.training.cells import Cell, Cells, Result
from qsvd.training.rates import best_rate, next_rates


def wanted(row: Row, seeds: int, cells: Cells) -> tuple[dict[float, Result], list[tuple[Cell, bool]]]:
    """Return the results of the sweep of a row so far, and the cells that it needs next, each with whether to test it.

    Only the runs at the best rate are tested.
    """
    results: dict[float, Result] = {}
    while needed := next_rates(row.rates, losses(results), grows=row.grows):
        found = {rate: cells.result(row.cell(rate, 0)) for rate in needed}
        results |= {rate: result for rate, result in found.items() if result is not None}
        if lacking := [(row.cell(rate, 0), False) for rate, result in found.items() if result is None]:
            return results, lacking
    best = best_rate(losses(results))
    final = [] if best is None else [row.cell(best, seed) for seed in range(seeds)]
    return results, [(cell, True) for cell in final if not is_done(cells, cell, is_tested=True)]


def is_done(cells: Cells, cell: Cell, *, is_tested: bool) -> bool:
    """Return whether a cell is trained, and tested if it is to be; a run that stopped has no test."""
    result = cells.result(cell)
    return result is not None and (not is_tested or result.stopped is not None or cells.test(cell) is not None)


def losses(results: Mapping[float, Result]) -> dict[float, float | None]:
    """Return the validation losses by learning rate; None where the run stopped."""
    return {rate: result.valid_loss for rate, result in results.items()}


def lacking(run: CompareRun, cells: Cells) -> list[tuple[int, Cell, bool]]:
    """Return what all rows need next: the number of the row from 0, the cell, and whether to test it."""
    return [(number, *one) for number, row in enumerate(run.rows) for one in wanted(row, run.options.seeds, cells)[1]]


def finished(run: CompareRun, row: Row, cells: Cells) -> Iterator[tuple[float, int, Cell]]:
    """Yield rate, seed and cell of all that is done of a row, in order."""
    results, _ = wanted(row, run.options.seeds, cells)
    best = best_rate(losses(results))
    for rate in sorted(results):
        for seed in range(run.options.seeds if rate == best else 1):
            if cells.result(cell := row.cell(rate, seed)) is not None:
                yield rate, seed, cell


def row_result(run: CompareRun, number: int, row: Row, cells: Cells) -> RowResult:
    """Return a row of the results, without statistics.

    Args:
        number: From 1.
    """
    results, _ = wanted(row, run.options.seeds, cells)
    best = best_rate(losses(results))
    final = [] if best is None else [(seed, row.cell(best, seed)) for seed in range(run.options.seeds)]
    done = [(seed, result, cells.test(c)) for seed, c in final if (result := cells.result(c)) is not None]
    counts = [one.trained_parameters for one in results.values() if one.trained_parameters is not None]
    return RowResult(
        row=number,
        method=row.method.text,
        split=row.split_name,
        rank=row.size.rank,
        stored_rank=row.size.stored_rank,
        trained_parameters=counts[0] if counts else None,
        adapter_parameters=row.size.parameters,
        num_bytes=row.size.num_bytes,
        note=_note(sorted(results), best),
        rates=tuple(Rate(rate, results[rate].valid_loss, results[rate].stopped) for rate in sorted(results)),
        best_rate=best,
        seeds=tuple(Seed(s, t and t.test_loss, t and t.test_accuracy, r.valid_loss, r.stopped) for s, r, t in done),
    )


def _note(tried: list[float], best: float | None) -> str:
    """Return why a row is not tuned; nothing if its best rate is between two others."""
    if len(tried) == 1:
        return "not tuned"
    if best is None:
        return "not tuned: all rates diverged"
    return "not tuned: best at an end of its rates" if best in (tried[0], tried[-1]) else ""


def head_of(run: CompareRun) -> dict[str, Any]:
    """Return what results.jsonl says of the whole comparison."""
    options, held_out = run.options, run.data.held_out
    return {
        "format": 1,
        "command": compare_command(options),
        "model": options.model,
        "data": options.data,
        "digests": dict(run.digests),
        "examples": {
            "train": len(run.data.lengths),
            "valid": 0 if held_out is None else len(held_out.input_ids),
            "test": len(run.test.input_ids),
        },
        "equal": options.equal,
        "size": run.limit,
        "seeds": options.seeds,
        "has_accuracy": bool(run.data.train.label_names),
    }


def estimate(run: CompareRun, cells: Cells | None) -> str:
    """Return how many cells there are, how many are done, and how long the others take.

    Args:
        cells: None if there is no folder yet.
    """
    least = sum(len(row.rates) + run.options.seeds - 1 for row in run.rows)
    what = f"{len(run.rows)} rows, {len(run.left_out)} left out, {len(run.quantizing)} splits, at least {least} cells"
    done = [] if cells is None else [(cells, cell) for row in run.rows for _, _, cell in finished(run, row, cells)]
    if not done:
        return what
    seconds = statistics.fmean(place.machine(cell).get("seconds", 0.0) for place, cell in done)
    left = max(least - len(done), 0) * seconds / 60
    return f"{what}; {len(done)} done, of {seconds:.0f} s each: about {left:.0f} minutes left for one process"
