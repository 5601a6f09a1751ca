"""What the functions of qsvd/api.py return: the numbers that the command of the same name reports."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsvd.records import WeightError
from qsvd.report.comparison.results import RowResult
from qsvd.report.evaluation import ModelScores
from qsvd.report.totals import Total, relative
from qsvd.report.training import RunSummary

if TYPE_CHECKING:
    from qsvd.plan.allocation import Allocation


@dataclass(frozen=True)
class Written(PathLike[str]):
    """A file or folder that was written. It can be used as its path: open(x), x / "report.md", x.name.

    Args:
        path: The file or folder.
        url: Its address on the Hub, if it was uploaded.
    """

    path: Path
    url: str | None = field(default=None, kw_only=True)

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str | PathLike[str]) -> Path:
        return self.path / name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "path":  # copy and pickle ask before `path` is set
            raise AttributeError(name)
        return getattr(self.path, name)


@dataclass(frozen=True)
class QuantizeResult(Written):
    """A quantized model and its error.

    Args:
        errors: The error of every weight.
        totals: One for each layer type, then one for the model.
    """

    errors: tuple[WeightError, ...]
    totals: tuple[Total, ...]

    @property
    def bits(self) -> float:
        """Stored bits per element of the quantized weights, components included."""
        return self.totals[-1].bits

    @property
    def error_without_components(self) -> float:
        """Relative Frobenius error ||W - codec(W)|| / ||W|| of all weights together."""
        return relative(self.totals[-1])[0]

    @property
    def error(self) -> float:
        """Relative Frobenius error ||W - Q - B A|| / ||W|| of all weights together."""
        return relative(self.totals[-1])[1]


@dataclass(frozen=True)
class CalibrateResult(Written):
    """A file of statistics: the examples and tokens behind it, and their mean loss in nats."""

    examples: int
    tokens: int
    loss: float


@dataclass(frozen=True)
class PruneResult(Written):
    """A pruned model: channels of each MLP, and parameters of the model, before and after."""

    channels: int
    kept: int
    parameters: int
    kept_parameters: int


@dataclass(frozen=True)
class AllocateResult(Written):
    """A file with a codec and a rank for every weight.

    Args:
        allocation: The codec and rank of every weight.
        num_bytes: Bytes that count against the budget.
        expected_error: Relative Frobenius error of all weights together.
    """

    allocation: "Allocation"
    num_bytes: int
    expected_error: float


@dataclass(frozen=True)
class TrainResult(Written):
    """A complete run.

    Args:
        losses: Nats, of every step.
        summary: As in summary.json.
    """

    losses: tuple[float, ...]
    summary: RunSummary

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return self.summary.steps


@dataclass(frozen=True)
class AggregateResult(Written):
    """The average of several runs, as a run.

    Args:
        rank: Of the average, in layers that are not smaller.
        error: Relative Frobenius error of the rank: what it leaves out of the average, over all layers together.
        errors: The same for each layer, by its path.
    """

    rank: int
    error: float
    errors: Mapping[str, float]


@dataclass(frozen=True)
class CompareResult(Written):
    """A comparison: its rows in order, as in results.jsonl."""

    rows: tuple[RowResult, ...]


@dataclass(frozen=True)
class EvalResult:
    """The scores of every model, in the order given, and how they were measured."""

    rows: tuple[ModelScores, ...]
    how: Mapping[str, object]


@dataclass(frozen=True)
class Checked:
    """Difference between the logits of an export and the expected ones.

    difference is the largest difference of a logit, spread the standard deviation of all logits, agreement the share
    of positions with the same most probable token (or class) as the trained model has.
    """

    difference: float
    spread: float
    agreement: float

    def line(self, expected: str) -> str:
        """Return the difference in words."""
        return (
            f"checked: logits differ by at most {self.difference:.2g} from {expected} (their spread is "
            f"{self.spread:.2g}); {self.agreement:.1%} of top tokens as trained"
        )


@dataclass(frozen=True)
class ExportResult(Written):
    """An export.

    Args:
        num_bytes: Of all tensors.
        checked: None if the logits were not compared.
        lines: What the command prints: the size, the check, and commands that serve the export.
    """

    num_bytes: int
    checked: Checked | None
    lines: tuple[str, ...]
