"""The summary of a training run: tables for the terminal, and RUN/README.md."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Group
from rich.table import Table

from qsvd.report.card import code, markdown, shell


@dataclass(frozen=True)
class RunSummary:
    """A training run and its results.

    Args:
        base: The quantized model, as it was given.
        tokens, seconds: Of all parts of the run, interrupted ones too.
        first_loss, last_loss: Nats, of the first and the last step.
        held_out_before, held_out_after: Nats per trained token, or per example for a classifier; None without held-out
            examples.
        accuracy_before, accuracy_after: Shares, 0..1; None if it is not a classifier.
        memory, planned: Bytes by item, measured and planned.
        resident: Which 4-bit weights stay on the device, in words.
        activations: Which blocks keep their activations, in words; empty where an older version wrote the run.
        best_step: The step with the lowest held-out loss, whose adapter the run holds; None without --keep-best.
        held_out_examples: None where there are none, or where an older version wrote the run.
        classes: Of a classifier; 0 for a language model.
        first_step_seconds: From the start of loading to the end of the first step, since the run was last resumed; None
            if no step was left, or where an older version wrote the run.
        moved_bytes: Bytes of offloaded weights that were copied to the device since the run was last resumed.
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
    activations: str = ""
    best_step: int | None = None
    held_out_examples: int | None = None
    classes: int = 0
    first_step_seconds: float | None = None


def training_tables(summary: RunSummary) -> Group:
    """Return the summary as two tables: the run, and its memory."""
    table = Table(title="Training run", show_header=False, title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in rows(summary):
        table.add_row(name, value)
    whose = "the process" if summary.device == "cpu" else "PyTorch on the GPU"
    memory = Table("item", "planned (MB)", "measured (MB)", title=f"Memory of {whose}", title_justify="left")
    for column in memory.columns[1:]:
        column.justify = "right"
    for name, num_bytes in summary.memory.items():
        memory.add_row(name, f"{summary.planned[name] / 1e6:,.1f}", f"{num_bytes / 1e6:,.1f}")
    return Group(table, memory)


def rows(summary: RunSummary, *, is_timed: bool = True) -> list[tuple[str, str]]:
    """Return the rows of the first table, names and values; without times they are the same for the same run."""
    held_out = "held-out" if summary.held_out_examples is None else f"held-out ({summary.held_out_examples:,} examples)"
    found = [
        ("quantized model", summary.base),
        ("method", f"{summary.method}, {summary.optimizer}, learning rate {summary.learning_rate:g}"),
        ("trained parameters", f"{summary.trained_parameters:,}"),
        ("steps", f"{summary.steps:,}"),
        ("tokens", f"{summary.tokens:,}{_speed(summary) if is_timed else ''}"),
        *(_first_step(summary) if is_timed else []),
        ("training loss, first and last step (nats)", f"{summary.first_loss:.4f}, {summary.last_loss:.4f}"),
        (
            f"{held_out} loss, before and after (nats)",
            _pair(summary.held_out_before, summary.held_out_after, ".4f") or "no held-out examples",
        ),
        (f"4-bit weights on the {'CPU' if summary.device == 'cpu' else 'GPU'}", summary.resident),
    ]
    if summary.activations:
        found.append(("activations", summary.activations.removeprefix("activations of ")))
    if summary.best_step is not None:
        found.append(("adapter", f"of step {summary.best_step:,}, which has the lowest held-out loss"))
    accuracy = _pair(summary.accuracy_before, summary.accuracy_after, ".2%")
    return [*found, (f"{held_out} accuracy, before and after", accuracy)] if accuracy else found


def _speed(summary: RunSummary) -> str:
    return f" in {summary.seconds:.0f} s, {summary.tokens / summary.seconds:,.0f} per second"


def _first_step(summary: RunSummary) -> list[tuple[str, str]]:
    seconds = summary.first_step_seconds
    return [] if seconds is None else [("first step done", f"{seconds:.1f} s after loading began")]


def _pair(before: float | None, after: float | None, form: str) -> str:
    return "" if before is None or after is None else f"{before:{form}}, {after:{form}}"


FORMS = {"peft": "a PEFT adapter for the residual", "merged": "a 16-bit model"}  # of qsvd export


def run_readme(summary: RunSummary, run: str, forms: Sequence[str] = tuple(FORMS)) -> str:
    """Return RUN/README.md: what the folder holds, the summary, and commands to use it.

    Args:
        run: The folder, as the user wrote it.
        forms: Of FORMS, those that the method can be exported in.
    """
    lines = "\n".join(f"| {name} | {markdown(value)} |" for name, value in rows(summary, is_timed=False))
    same = without = ""
    if "peft" in forms:
        peft = "AutoPeftModelForSequenceClassification" if summary.classes else "AutoPeftModelForCausalLM"
        labels = f", num_labels={summary.classes}" if summary.classes else ""
        same = " `adapter_model.safetensors` and `adapter_config.json` are the\nsame adapter for PEFT."
        without = (
            f"```python\nfrom peft import {peft}  # without qsvd\n\n"
            f"model = {peft}.from_pretrained({run!r}{labels})\n```\n\n"
        )
    exports = [f"qsvd export {shell(run)} --to {one} --out {shell(f'{run}-{one}')}  # {FORMS[one]}" for one in forms]
    return (
        f"# A run of qsvd train\n\n`qsvd_adapter.safetensors` is the trained adapter. It works only with the\n"
        f"quantized model in {code(summary.base)}.{same} `steps.jsonl` lists every step, which "
        f"`qsvd report --html` draws, and\n`summary.json` holds the numbers below.\n\n| | |\n| --- | --- |\n{lines}\n\n"
        f"```python\nimport qsvd\n\nmodel = qsvd.load({summary.base!r}, adapter={run!r})\n```\n\n{without}"
        + ("\n".join(["```sh", *exports, "```", ""]) if exports else "")
    )


# An average of runs.


WORST = 10  # layers that are printed


def aggregate_table(rank: int, error: float, errors: Mapping[str, float]) -> Table:
    """Return the relative errors of the rank of an average: of all layers, and of the worst ones."""
    table = Table("layer", "relative error", title=f"Average of rank {rank}", title_justify="left")
    table.columns[1].justify = "right"
    worst = sorted(errors, key=lambda path: (-errors[path], path))[:WORST]
    for path in worst:
        table.add_row(path, f"{errors[path]:.2e}")
    others = len(errors) - len(worst)
    if others:
        table.add_row(f"{others} others, at most", f"{min(errors[path] for path in worst):.2e}")
    table.add_row("all layers", f"{error:.2e}")
    return table


def aggregate_readme(base: str, rank: int, error: float, runs: Sequence[str]) -> str:
    """Return the README.md of an average.

    Args:
        base: The quantized model.
        runs: The runs, as the user wrote them.
    """
    lines = "\n".join(f"- {code(run)}" for run in runs)
    return (
        f"# An average of {len(runs)} runs of qsvd train\n\n`qsvd_adapter.safetensors` is a LoRA of rank {rank} on\n"
        f"the quantized model in {code(base)}. Its product is the average of those of these runs; the rank leaves\n"
        f"out {error:.2e} of it (relative Frobenius error). `qsvd_aggregate.json` has the error of each layer, and\n"
        f"`adapter_model.safetensors` and `adapter_config.json` are the same adapter for PEFT.\n\n{lines}\n"
    )
