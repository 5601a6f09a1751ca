"""Plots of a comparison: quality against parameters, and loss against learning rate; the same bytes each time."""

import io
from collections.abc import Sequence
from typing import Any

from qsvd.report.comparison.results import RowResult

MARKERS = "os^Dvp*X"


def quality_plot(rows: Sequence[RowResult]) -> bytes:
    """Return an SVG of the test loss, mean and deviation over seeds, against the trained parameters."""
    figure, axes = _figure()
    for number, row in enumerate(rows):
        if row.test_loss is None or row.trained_parameters is None:
            continue
        axes.errorbar(
            row.trained_parameters * 1.02 ** (number % 5 - 2),  # so that equal numbers stay apart
            row.test_loss,
            row.test_loss_deviation or 0.0,
            marker=MARKERS[number // 10 % len(MARKERS)],
            color=f"C{number % 10}",
            capsize=3,
            linestyle="",
            label=_label(row),
        )
    axes.set(xscale="log", xlabel="trained parameters", ylabel="test loss (nats)")
    return _svg(figure, axes)


def rates_plot(rows: Sequence[RowResult]) -> bytes:
    """Return an SVG of the validation loss of the first seed against the learning rate, a line for each row."""
    figure, axes = _figure()
    for number, row in enumerate(rows):
        points = [(one.learning_rate, one.valid_loss) for one in row.rates if one.valid_loss is not None]
        if points:
            marker, color = MARKERS[number // 10 % len(MARKERS)], f"C{number % 10}"
            axes.plot(*zip(*points, strict=True), marker=marker, color=color, markersize=4, label=_label(row))
    axes.set(xscale="log", xlabel="learning rate", ylabel="validation loss (nats)")
    return _svg(figure, axes)


def _label(row: RowResult) -> str:
    note = f" ({row.note})" if row.note else ""
    return f"{row.method}, {row.split}{note}".replace("$", r"\$")


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    return figure, figure.add_subplot()


def _svg(figure: Any, axes: Any) -> bytes:
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    FigureCanvasSVG(figure)
    picture = io.BytesIO()
    with rc_context({"svg.hashsalt": "qsvd"}):
        figure.savefig(picture, format="svg", metadata={"Date": None})
    return picture.getvalue()
