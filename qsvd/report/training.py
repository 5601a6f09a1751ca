"""The summary of a training run, for the terminal and for RUN/README.md."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from shlex import quote

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from rich.console import Group
from rich.table import Table


@dataclass(frozen=True)
class RunSummary:
    """What a training run was and what came of it.

    held_out_before and held_out_after are nats per trained token (per example for a classifier), None where nothing is
    held out; accuracies are of a classifier. seconds and tokens count interrupted parts too. memory and planned are
    bytes by item; moved_bytes came to the device in pages, since the run was last resumed.
    """

    base: str
    method: str
    learning_rate: float
    optimizer: str
    trained_parameters: int
    steps: int
    tokens: int
    seconds: float
    first_loss: float
    last_loss: float
    held_out_before: float | None
    held_out_after: float | None
    accuracy_before: float | None
    accuracy_after: float | None
    memory: Mapping[str, int]
    planned: Mapping[str, int]
    resident: str
    moved_bytes: int
    device: str


def training_tables(summary: RunSummary) -> Group:
    """The summary as tables."""
    table = Table("training run", "", title_justify="left")
    table.columns[1].overflow = "fold"
    for name, value in rows(summary):
        table.add_row(name, value)
    whose = "memory of the process" if summary.device == "cpu" else "memory of torch"
    memory = Table(whose, "planned MB", "MB", title_justify="left")
    for column in memory.columns[1:]:
        column.justify = "right"
    for name, num_bytes in summary.memory.items():
        memory.add_row(name, f"{summary.planned[name] / 1e6:,.1f}", f"{num_bytes / 1e6:,.1f}")
    return Group(table, memory)


def rows(summary: RunSummary) -> list[tuple[str, str]]:
    """What there is to say, by name."""
    found = [
        ("base", summary.base),
        ("method", f"{summary.method}, {summary.optimizer}, learning rate {summary.learning_rate:g}"),
        ("trained parameters", f"{summary.trained_parameters:,}"),
        ("steps", f"{summary.steps:,}"),
        ("tokens", f"{summary.tokens:,} in {summary.seconds:.0f} s, {summary.tokens / summary.seconds:,.0f} a second"),
        ("loss, first and last step", f"{summary.first_loss:.4f}, {summary.last_loss:.4f}"),
        ("held-out loss, before and after", _pair(summary.held_out_before, summary.held_out_after, ".4f")),
        ("4-bit weights on the device", summary.resident),
    ]
    if summary.accuracy_before is not None:
        found.append(
            ("held-out accuracy, before and after", _pair(summary.accuracy_before, summary.accuracy_after, ".2%"))
        )
    return found


def run_readme(summary: RunSummary, run: str) -> str:
    """RUN/README.md: what the folder is, and what to do with it."""
    lines = "\n".join(f"| {name} | {value} |" for name, value in rows(summary))
    return (
        f"# A run of qsvd train\n\n`qsvd_adapter.safetensors` is what was trained, beside the residual in\n"
        f"`{summary.base}`, and fits no other. `steps.jsonl` has every step, `loss.png` and `loss.svg` show them,\n"
        f"`summary.json` has the numbers below.\n\n| | |\n| --- | --- |\n{lines}\n\n"
        f"```python\nimport qsvd\n\nmodel = qsvd.load({summary.base!r}, adapter={run!r})\n```\n\n"
        f"```sh\nqsvd export {quote(run)} --to peft --out {quote(run + '-peft')}      # for PEFT, on the residual\n"
        f"qsvd export {quote(run)} --to merged --out {quote(run + '-merged')}  # 16-bit weights, for all else\n```\n"
    )


def _pair(before: float | None, after: float | None, form: str) -> str:
    if before is None or after is None:
        return "nothing held out"
    return f"{before:{form}}, {after:{form}}"


# The loss of a run as a picture.


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
