"""The page of a training run: its curves, its speed and memory, and the command that repeats it."""

from collections.abc import Sequence
from dataclasses import dataclass

from qsvd.records import Start, Step, Texts, Written
from qsvd.report.errors import number, short_count
from qsvd.report.page.charts import Axis, Series, line_chart, thinned, two_bars
from qsvd.report.page.document import Number, Section, Subject, warnings_section
from qsvd.report.page.markup import Markup, escaped, join, tag
from qsvd.report.page.tables import Head, command, table
from qsvd.report.training import RunSummary, rows

MACHINE = "machine"  # the section of times and memory: all else is the same whenever a run is repeated
SMOOTH = 0.9  # weight of the past in the running mean
FEW = 20  # steps below which there is no running mean
STEP = Axis("step", includes=(0.0,), is_whole=True)


@dataclass(frozen=True)
class RunRecords:
    """What is on disk of a run.

    Args:
        start: None before the first measurement.
        summary: None while the run goes on.
        command, total_steps: As run.json has them; "" and None of an older version.
        texts: None of a short run, of a model that writes no text, and of an older version.
    """

    start: Start | None
    steps: Sequence[Step]
    summary: RunSummary | None
    command: str = ""
    total_steps: int | None = None
    texts: Texts | None = None


def run_subject(name: str, found: RunRecords) -> Subject:
    """Return what a page shows of a run.

    Args:
        name: Of the folder.
    """
    curves = _loss_curves(found)
    warnings = _warnings(found)
    sections = [
        _loss(found, curves),
        *([] if found.summary is None else [_summary(found.summary)]),
        _machine(found),
        _examples(found, name),
        warnings_section(warnings),
        _repeat(found),
    ]
    main, held_out = (next(one for one in curves if one.look == look) for look in (0, 1))
    curves_together = {"Training loss": main, "Held-out loss": held_out}
    return Subject(
        name=name,
        kind="run",
        sentence=_sentence(found),
        numbers=_numbers(found),
        sections=sections,
        facts=_facts(found),
        curves=curves_together,
        warnings=warnings,
        is_finished=found.summary is not None,
    )


def held_out_of(found: RunRecords) -> list[tuple[float, float]]:
    """Return steps and the held-out loss after them; step 0 is before the first one."""
    points = {float(step.number): step.held_out for step in found.steps if step.held_out is not None}
    if found.start is not None and found.start.held_out_before is not None:
        points[0.0] = found.start.held_out_before
    if found.summary is not None and found.summary.held_out_after is not None:
        points[float(found.summary.best_step or len(found.steps))] = found.summary.held_out_after
    return sorted(points.items())


def _sentence(found: RunRecords) -> str:
    summary = found.summary
    if summary is None:
        total = f" of {found.total_steps:,}" if found.total_steps else ""
        return f"This run is not finished: {len(found.steps):,}{total} steps are recorded."
    trained = f"{summary.method} trained {short_count(summary.trained_parameters)} parameters on {summary.base}"
    if summary.held_out_before is None or summary.held_out_after is None:
        return f"{trained} for {_steps(summary.steps)}; there are no held-out examples."
    verb = "fell" if summary.held_out_after < summary.held_out_before else "did not fall"
    change = f"{verb} from {number(summary.held_out_before)} to {number(summary.held_out_after)} nats"
    if verb != "fell":
        change = f"did not fall: {number(summary.held_out_before)} before, {number(summary.held_out_after)} nats after"
    return f"{trained} for {_steps(summary.steps)}, and the held-out loss {change}."


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count:,} steps"


def _numbers(found: RunRecords) -> list[Number]:
    held_out, steps = held_out_of(found), found.steps
    losses = [("Held-out loss before", held_out[0][1]), ("Held-out loss after", held_out[-1][1])] if held_out else []
    if not held_out and steps:
        losses = [("Loss, first step", steps[0].loss), ("Loss, last step", steps[-1].loss)]
    if not steps:
        losses = losses[:1]
    shown = [Number(label, number(loss), "nats") for label, loss in losses]
    if found.summary is None:
        total = f"of {found.total_steps:,}" if found.total_steps else ""
        return [*shown, Number("Steps", f"{len(steps):,}", note=total),
                Number("Tokens", short_count(steps[-1].tokens if steps else 0))]  # fmt: skip
    summary = found.summary
    accuracy = summary.accuracy_after
    if accuracy is not None and summary.accuracy_before is not None:
        shown = [Number("Accuracy before", f"{100 * summary.accuracy_before:.2f}", "%"),
                 Number("Accuracy after", f"{100 * accuracy:.2f}", "%")]  # fmt: skip
    return [
        *shown,
        Number("Steps", f"{summary.steps:,}", note=f"{short_count(summary.tokens)} tokens"),
        Number("Trained parameters", short_count(summary.trained_parameters), note=summary.method),
    ]


def _loss_curves(found: RunRecords) -> list[Series]:
    """Return the loss of batches, its running mean, and the held-out loss; the mean, or the loss, has look 0."""
    losses = [(float(step.number), step.loss) for step in found.steps]
    held_out = Series("held out", held_out_of(found), 1, has_dots=True)
    if len(losses) < FEW:
        return [Series("batch", losses, 0), held_out]
    means = running_mean([loss for _, loss in losses])
    mean = thinned([(x, y) for (x, _), y in zip(losses, means, strict=True)])
    return [Series("batch", thinned(losses), -1), Series("running mean", mean, 0), held_out]


def running_mean(losses: Sequence[float]) -> list[float]:
    """Return the exponential mean at every step, corrected for its start at zero as in Adam (arXiv:1412.6980)."""
    means, mean = [], 0.0
    for step, loss in enumerate(losses, start=1):
        mean = SMOOTH * mean + (1 - SMOOTH) * loss
        means.append(mean / (1 - SMOOTH**step))
    return means


def _loss(found: RunRecords, curves: Sequence[Series]) -> Section:
    rates = thinned([(float(step.number), step.learning_rate) for step in found.steps])
    norms = thinned([(float(step.number), step.grad_norm) for step in found.steps])
    small = [
        line_chart("Learning rate", STEP, Axis("per step", includes=(0.0,)), [Series("learning rate", rates)]),
        line_chart(
            "Gradient norm", STEP, Axis("before clipping", includes=(0.0,)), [Series("gradient norm", norms, 2)]
        ),
    ]
    body = join([line_chart("Loss", STEP, Axis("nats"), curves), tag("div", small, class_="charts")])
    return Section("loss", "Loss", body, "Nats per trained token, or per example for a classifier.")


def _summary(summary: RunSummary) -> Section:
    lines = [[name, value] for name, value in rows(summary, is_timed=False)]
    heads = [Head("item", is_number=False), Head("value", is_number=False)]
    return Section("summary", "Summary", table("The run", heads, lines))


def _machine(found: RunRecords) -> Section:
    speed = line_chart("Speed", STEP, Axis("tokens/s", includes=(0.0,)), [Series("speed", _speeds(found.steps))])
    peaks = thinned([(float(step.number), step.peak_bytes / 1e9) for step in found.steps])
    peak = line_chart("Peak memory so far", STEP, Axis("GB", includes=(0.0,)), [Series("peak memory", peaks)])
    charts = tag("div", speed, peak, class_="charts")
    summary = found.summary
    if summary is None:
        return Section(MACHINE, "Speed and memory", charts)
    whose = "the process" if summary.device == "cpu" else "PyTorch on the GPU"
    words = f"{summary.tokens:,} tokens in {summary.seconds:,.0f} s on {summary.device}. Memory is that of {whose}."
    return Section(MACHINE, "Speed and memory", join([charts, _memory(summary)]), words)


def _memory(summary: RunSummary) -> Markup:
    largest = max([*summary.memory.values(), *summary.planned.values(), 1])
    heads = [Head("item", is_number=False), Head("planned (MB)"), Head("measured (MB)"),
             Head("planned above, measured below", is_number=False, is_minor=True)]  # fmt: skip
    lines = []
    for name, measured in summary.memory.items():
        planned = summary.planned.get(name, 0)
        first, second = f"{planned / 1e6:,.1f}", f"{measured / 1e6:,.1f}"
        bars = two_bars(planned, measured, largest, f"{first} MB planned, {second} MB measured")
        lines.append([name, first, second, bars])
    return table("Memory by item", heads, lines, total=True)


def _speeds(steps: Sequence[Step]) -> list[tuple[float, float]]:
    """Return tokens per second of every step, means over groups of a long run."""
    size = max(1, -(-len(steps) // 150))
    ends = [*steps[size - 1 :: size]]
    before: tuple[int, float] = (0, 0.0)
    points = []
    for step in ends:
        tokens, seconds = step.tokens - before[0], step.seconds - before[1]
        if seconds > 0:
            points.append((float(step.number), tokens / seconds))
        before = (step.tokens, step.seconds)
    return points


def _examples(found: RunRecords, name: str) -> Section:
    """Return what the model writes before and after training, or the command that writes a text."""
    if found.texts is None:
        words = "This run has no generated texts. This command writes one:"
        line = f"qsvd generate RUN --prompt TEXT  # RUN: the folder {name}"
        return Section("examples", "Examples", join([tag("p", words, class_="none"), command(line)]))
    note = f"The ends of prompts, and at most {found.texts.new_tokens} tokens after each, without sampling."
    return Section("examples", "Examples", join(map(_example, found.texts.examples)), note)


def _example(one: Written) -> Markup:
    texts = {"Prompt": one.prompt, "In the data": one.expected, "Before training": one.before}
    if one.after is not None:
        texts["After training"] = one.after
    return tag("dl", [join([tag("dt", name), tag("dd", _lines(text))]) for name, text in texts.items()], class_="texts")


def _lines(text: str) -> Markup:
    """Return a text with its line breaks; all else that is not a character to see is an escape."""
    return Markup("\n".join(map(escaped, text.splitlines()))) if text.strip() else tag("span", "(nothing)")


def _warnings(found: RunRecords) -> list[str]:
    summary, warnings = found.summary, []
    held_out = held_out_of(found)
    if len(held_out) > 1 and held_out[-1][1] > held_out[0][1]:
        warnings.append("The held-out loss is higher than before training: the learning rate may be too high.")
    lowest = min(held_out, key=lambda point: point[1]) if held_out else None
    if summary is not None and lowest and lowest[0] and summary.best_step is None and lowest[1] < held_out[-1][1]:
        warnings.append(
            f"The held-out loss was lowest after step {lowest[0]:,.0f} ({number(lowest[1])}); --keep-best keeps that "
            "adapter."
        )
    if not held_out:
        warnings.append(
            "There is no held-out loss: the training loss alone does not show whether the model got better."
        )
    return warnings


def _repeat(found: RunRecords) -> Section:
    if not found.command:
        words = "The command was not recorded. run.json has its options."
        return Section("repeat", "Command", tag("p", words, class_="none"))
    return Section("repeat", "Command", command(found.command), "This command repeats the run.")


def _facts(found: RunRecords) -> dict[str, str]:
    summary, held_out = found.summary, held_out_of(found)
    facts = {"steps": f"{len(found.steps):,}"}
    if summary is not None:
        facts |= {
            "quantized model": summary.base,
            "method": summary.method,
            "learning rate": f"{summary.learning_rate:g}",
            "optimizer": summary.optimizer,
            "trained parameters": f"{summary.trained_parameters:,}",
            "tokens": f"{summary.tokens:,}",
        }
    if held_out:
        facts |= {"held-out loss before": number(held_out[0][1]), "held-out loss after": number(held_out[-1][1])}
    if found.steps:
        facts |= {"last training loss": number(found.steps[-1].loss)}
    if summary is not None:
        facts |= {
            "tokens per second": f"{summary.tokens / summary.seconds:,.0f}" if summary.seconds else "",
            "peak memory (GB)": f"{summary.memory.get('peak', 0) / 1e9:.2f}",
        }
    return facts
