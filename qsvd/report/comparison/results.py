"""The results of a comparison: one record a row, with means, deviations and a paired test against the first row."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

CERTAIN = 0.05  # level of the tests
POWER = 0.8  # of which the smallest difference is given


@dataclass(frozen=True)
class Rate:
    """A learning rate of a sweep: the validation loss of the first seed, or why the run stopped."""

    learning_rate: float
    valid_loss: float | None
    stopped: str | None


@dataclass(frozen=True)
class Seed:
    """A run at the best rate; without numbers if it stopped."""

    seed: int
    test_loss: float | None
    test_accuracy: float | None
    valid_loss: float | None
    stopped: str | None


@dataclass(frozen=True)
class Paired:
    """The paired t-test of a row against the first one, on the test losses of the seeds that both have.

    Args:
        n: Pairs.
        difference: Mean of this row minus the first; below 0 is better.
        low, high: 95 % interval of the difference.
        p: Two-sided; None where the differences do not differ among each other.
        p_holm: The same, corrected for the number of rows (Holm 1979, Scand. J. Statist. 6, page 65).
        detectable: The smallest true difference that such a test finds in 80 % of the cases, at this spread.
    """

    n: int
    difference: float
    low: float | None
    high: float | None
    p: float | None
    detectable: float | None
    p_holm: float | None = None


@dataclass(frozen=True)
class RowResult:
    """One row of a comparison.

    Args:
        row: Its number, from 1.
        method, split: As given, the split with its rank.
        rank: Of the method; None if it trains the stored components.
        stored_rank: Of the split; None if its options give each layer its own.
        trained_parameters: As counted in the run, with a new classification head.
        adapter_parameters, num_bytes: As planned: trained parameters without a head; bytes of model and adapter.
        note: Why the row is not tuned; empty if it is.
        rates: The sweep, the lowest rate first.
        best_rate: None if all runs of the sweep diverged.
        seeds: Runs at the best rate.
        test_loss, test_accuracy: Means over the seeds that did not stop; deviations are those of the sample.
        paired: None for the first row, and with fewer than two pairs.
    """

    row: int
    method: str
    split: str
    rank: int | None
    stored_rank: int | None
    trained_parameters: int | None
    adapter_parameters: int
    num_bytes: int
    note: str
    rates: tuple[Rate, ...]
    best_rate: float | None
    seeds: tuple[Seed, ...]
    test_loss: float | None = None
    test_loss_deviation: float | None = None
    test_accuracy: float | None = None
    test_accuracy_deviation: float | None = None
    paired: Paired | None = None

    @property
    def is_tuned(self) -> bool:
        return not self.note


def with_statistics(rows: Sequence[RowResult]) -> list[RowResult]:
    """Return the rows with means, deviations and tests against the first one."""
    found = []
    for row in rows:
        losses = [one.test_loss for one in row.seeds if one.test_loss is not None]
        shares = [one.test_accuracy for one in row.seeds if one.test_accuracy is not None]
        found.append(
            replace(
                row,
                test_loss=_mean(losses),
                test_loss_deviation=_deviation(losses),
                test_accuracy=_mean(shares),
                test_accuracy_deviation=_deviation(shares),
                paired=_paired(row, rows[0]) if row is not rows[0] else None,
            )
        )
    return _corrected(found)


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _deviation(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _paired(row: RowResult, first: RowResult) -> Paired | None:
    here, there = ({one.seed: one.test_loss for one in each.seeds} for each in (row, first))
    pairs = [(x, y) for seed, x in here.items() if x is not None and (y := there.get(seed)) is not None]
    differences = [x - y for x, y in pairs]
    if len(differences) < 2:
        return None
    mean, error = statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences))
    if not error:
        return Paired(len(differences), mean, None, None, None, None)
    from scipy import stats

    test: Any = stats.ttest_rel([x for x, _ in pairs], [y for _, y in pairs])
    half = float(stats.t.ppf(1 - CERTAIN / 2, len(pairs) - 1)) * error
    return Paired(len(pairs), mean, mean - half, mean + half, float(test.pvalue), detectable(len(pairs)) * error)


@cache
def detectable(n: int) -> float:
    """Return the smallest true difference, in standard errors, that a paired t-test of n pairs finds with POWER."""
    from scipy import integrate, optimize, stats

    limit = float(stats.t.ppf(1 - CERTAIN / 2, n - 1))
    spread: Any = stats.chi(n - 1, scale=(n - 1) ** -0.5)

    def missing(shift: float) -> float:
        """Return the power at a shift minus POWER; scipy's noncentral t is NaN for large shifts."""

        def found(scale: float) -> Any:  # given the estimated deviation, over the true one
            edge = limit * scale
            return (stats.norm.sf(edge - shift) + stats.norm.cdf(-edge - shift)) * spread.pdf(scale)

        return float(integrate.quad(found, 0, np.inf, limit=200)[0]) - POWER

    highest = 1.0
    while missing(highest) < 0:
        highest *= 2
    root: Any = optimize.brentq(missing, highest / 2, highest)
    return float(root)


def _corrected(rows: Sequence[RowResult]) -> list[RowResult]:
    """Return the rows with Holm's correction of p for all tests of the comparison."""
    tests = sorted((row.paired.p, row.row) for row in rows if row.paired is not None and row.paired.p is not None)
    known: dict[int, float] = {}
    highest = 0.0
    for number, (p, row) in enumerate(tests):
        highest = max(highest, min(1.0, (len(tests) - number) * p))
        known[row] = highest
    return [
        replace(row, paired=replace(row.paired, p_holm=known.get(row.row))) if row.paired is not None else row
        for row in rows
    ]
