"""The report as a JSON object: every number in full, under keys that stay."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from qsvd.decompose.measure import WeightError
from qsvd.report.header import Header
from qsvd.report.record import to_record
from qsvd.report.totals import Total, reduction, relative, totals, worst


def to_json(header: Header, errors: Sequence[WeightError], worst_count: int = 10) -> dict[str, Any]:
    """What json.dumps takes: the header's fields, then `totals` (the model last), `worst` and `weights` in order.

    Every total and weight has its norms `before` (the codec on W) and `after` (the split), in the units of W, their
    relative Frobenius errors (1 is the norm of W), and `reduction_percent` by norm.

    Raises:
        ValueError: As `totals` and `worst` do.
    """
    coverage = header.coverage
    return asdict(header) | {
        "coverage": asdict(coverage) | {"share": coverage.share, "left": [asdict(left) for left in coverage.left]},
        "totals": [asdict(total) | _derived(total) for total in totals(errors)],
        "worst": [to_record(error) | _derived(error) for error in worst(errors, worst_count)],
        "weights": [to_record(error) | _derived(error) for error in errors],
    }


def _derived(error: WeightError | Total) -> dict[str, Any]:
    before, after = relative(error)
    return {"relative_before": before, "relative_after": after, "reduction_percent": asdict(reduction(error))}
