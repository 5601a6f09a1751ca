"""The loss of a run as a picture."""

import io
from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

SMOOTH = 0.9  # of the running mean, where there are more than a few steps
FEW = 20


def loss_plot(losses: Sequence[float], held_out: tuple[float, float] | None, title: str, kind: str) -> bytes:
    """A picture of the loss of every step, and of its running mean.

    Args:
        losses: Nats, from step 1.
        held_out: Loss on held-out examples before the first and after the last step.
        kind: "png" or "svg".
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    steps = range(1, len(losses) + 1)
    few = len(losses) < FEW
    axes.plot(steps, losses, color="tab:blue", alpha=1 if few else 0.3, linewidth=1.5 if few else 0.8, label="batch")
    if not few:
        axes.plot(steps, _running_mean(losses), color="tab:blue", linewidth=1.8, label=f"running mean ({SMOOTH})")
    if held_out is not None:
        axes.plot([1, len(losses)], held_out, "o--", color="tab:orange", label="held out")
    axes.set(xlabel="step", ylabel="loss (nats)", title=title)
    axes.legend()
    axes.grid(alpha=0.3)
    (FigureCanvasAgg if kind == "png" else FigureCanvasSVG)(figure)
    picture = io.BytesIO()
    figure.savefig(picture, format=kind, dpi=150)
    return picture.getvalue()


def _running_mean(losses: Sequence[float]) -> list[float]:
    """Exponential, without the pull of the zero that it starts from (Adam's correction, arXiv:1412.6980)."""
    means, mean = [], 0.0
    for number, loss in enumerate(losses, start=1):
        mean = SMOOTH * mean + (1 - SMOOTH) * loss
        means.append(mean / (1 - SMOOTH**number))
    return means
