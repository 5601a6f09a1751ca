"""A memory plan as tables and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qsvd.errors import show_size
from qsvd.memory.duration import QuantizeTime, Rate, Speed, StepTime
from qsvd.memory.items import PLACES, Limits, MemoryPlan, Placement
from qsvd.memory.placement import Cell, Placed, Reach
from qsvd.memory.training import Training, show_activations
from qsvd.report.gpus.strategies import (
    MEMORY,
    GpusAnswer,
    gpus_headline,
    gpus_json,
    gpus_lacking,
    gpus_lines,
    gpus_table,
)

OFFLOADED = "*"
PLACE = {"gpu": "on the GPU", "host": "of CPU memory", "disk": "of disk space"}
CLOCK = (("days", 86_400), ("h", 3600), ("min", 60), ("s", 1))
TITLES = {"quantize": "qsvd quantize", "train": "qsvd train", "serve": "generating text"}
ROWS = {  # item of a plan -> its row in a table, where the words differ
    "page slots": "buffers for offloaded blocks",
    "pages": "offloaded blocks",
    "base": "quantized model",
    "checkpoints of activations": "activation checkpoints",
    "reserve": "reserved (fragmentation)",
}


@dataclass(frozen=True)
class QuantizeAnswer:
    """Memory and estimated time of `qsvd quantize`."""

    memory: MemoryPlan
    time: QuantizeTime


@dataclass(frozen=True)
class TrainAnswer:
    """A training run.

    Args:
        advice: Changes that make it fit or run faster.
        step: An estimate.
        steps: Their number, where it is known.
    """

    placed: Placed
    reach: Reach
    advice: tuple[str, ...]
    step: StepTime
    training: Training
    steps: int | None = None


@dataclass(frozen=True)
class ServeAnswer:
    """Generating text; page_seconds is the time to copy all offloaded blocks, once a token."""

    placed: Placed
    page_seconds: float


@dataclass(frozen=True)
class Answer:
    """All that `qsvd plan` was asked for; what it was not asked for is None.

    Args:
        blocks: Number of blocks of the model.
        what: The assumptions of the plan, in words.
        notes: About the model.
        run: Settings, data and steps of a run, where DATA is given.
        gpus: Training on several GPUs, which is then all that is planned.
    """

    quantize: QuantizeAnswer | None
    train: TrainAnswer | None
    serve: ServeAnswer | None
    cells: tuple[Cell, ...]
    blocks: int
    speed: Speed
    what: str
    notes: tuple[str, ...]
    run: dict[str, str] | None = None
    gpus: GpusAnswer | None = None

    @property
    def memory(self) -> tuple[MemoryPlan, ...]:
        """Every plan of memory."""
        plans = (
            self.quantize and self.quantize.memory,
            self.train and self.train.placed.memory,
            self.serve and self.serve.placed.memory,
        )
        return tuple(plan for plan in plans if plan is not None)

    @property
    def fits(self) -> bool:
        """Whether every task fits in the limits."""
        return all(plan.fits for plan in self.memory) and (self.gpus is None or self.gpus.best is not None)

    @property
    def lacking(self) -> tuple[str, ...]:
        """A sentence for each task that does not fit."""
        lacking = (lack(plan) for plan in self.memory if not plan.fits)
        return (*lacking, *([gpus_lacking(self.gpus.strategies)] if self.gpus and not self.gpus.best else ()))


def plan_tables(model: str, answer: Answer) -> Group:
    """Return a table and a few lines for each task, the table of GPUs, and the assumptions."""
    parts: list[RenderableType] = [Text(f"{model}: {answer.what}\n")]
    if answer.run is not None:
        parts += [run_table(answer.run), Text()]
    if answer.quantize is not None:
        parts += [memory_table(answer.quantize.memory), _lines([_quantize_line(answer.quantize.time, answer.speed)])]
    if answer.train is not None:
        parts += [memory_table(answer.train.placed.memory), _lines(_train_lines(answer, answer.train))]
    if answer.serve is not None:
        parts += [memory_table(answer.serve.placed.memory), _lines(_serve_lines(answer, answer.serve))]
    if answer.gpus is not None:
        parts += [gpus_table(answer.gpus), _lines([*gpus_lines(answer.gpus, answer.blocks), _speed(answer.speed)])]
    if answer.cells:
        legend = [
            "no: does not fit, even with all blocks offloaded",
            f"{OFFLOADED}: with activation checkpoints in CPU memory, which leaves more GPU memory free",
        ]
        parts += [explore_table(answer.cells, model), _lines(legend)]
    notes = dict.fromkeys((*answer.notes, *(note for plan in answer.memory for note in plan.notes)))
    return Group(*parts, *(Text(f"- {note}") for note in notes))


def headline(answer: Answer) -> str:
    """Return the first line: whether all fits, the memory and the time of the run, and what to change."""
    if answer.gpus is not None:
        return gpus_headline(answer.gpus)
    plans = answer.memory
    shown = answer.train.placed.memory if answer.train is not None else plans[0]
    lacking = [plan for plan in plans if not plan.fits]
    plan = shown if not lacking or shown in lacking else lacking[0]
    where = plan.lacking[0] if plan.lacking else "gpu" if plan.total("gpu") else "host"
    used, limit, place = plan.total(where), getattr(plan.limits, where), PLACE[where]
    line = f"{'Does not fit' if lacking else 'Fits'}: {_of(used, limit)} {place}"
    if limit is None:
        line = f"Needs {show_size(used)} {place}"
    if plan is not shown or answer.train is None:
        line += f" for {TITLES[plan.task]}"
    else:
        line += _run_words(answer.train, answer.speed)
    if limit is None:
        given = "--gpu and --host" if where == "gpu" else "--host"
        return f"{line}; no limit is known: give {given} to see whether it fits"
    advised = answer.train.advice if lacking and answer.train is not None and plan is shown else ()
    return f"{line}: try {' or '.join(word.removesuffix(' fits') for word in advised)}" if advised else line


def _run_words(train: TrainAnswer, speed: Speed) -> str:
    """Return the batch of a run, and its time if the number of steps is known."""
    words = f", batch {train.training.batch.batch} x {train.training.batch.tokens}"
    if train.steps is None:
        return words
    seconds = train.steps * train.step.seconds
    unit, size = next((unit, size) for unit, size in CLOCK if seconds >= size or size == 1)
    assumed = " at the assumed speed" if speed.flops.source == "assumed" else ""
    time = f"about {seconds / size:.2g} {unit}" if seconds >= 1 else "under 1 s"
    return f"{words}, {time}{assumed}"


def _of(used: int, limit: int | None) -> str:
    """Return 20.8 of 24.0 GB; small sizes in their own units."""
    if limit is None or min(used, limit) < 10**8:
        return f"{show_size(used)} of {show_size(limit or 0)}"
    return f"{used / 1e9:.1f} of {limit / 1e9:.1f} GB"


def run_table(rows: dict[str, str]) -> Table:
    """Return a table of the settings and the data of a run."""
    table = Table("setting", "value", title="What would be trained", title_justify="left", title_style="bold")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def memory_table(plan: MemoryPlan) -> Table:
    """Return a table of the items of a plan in GB, then totals, limits and what is left."""
    lacking = " and ".join(MEMORY[where] for where in plan.lacking)
    verdict = f"does not fit: too little {lacking}" if lacking else "fits"
    if plan.limits == Limits():
        verdict = "give --gpu and --host to see whether it fits"
    table = Table(title=f"{TITLES[plan.task]}: {verdict}", title_justify="left", title_style="bold")
    table.add_column("item")
    for where in PLACES:
        table.add_column(f"{MEMORY[where]} (GB)", justify="right")
    for item in plan.items:
        table.add_row(ROWS.get(item.name, item.name), *(_item(getattr(item, where)) for where in PLACES))
    table.add_section()
    table.add_row("total", *(_gb(plan.total(where)) for where in PLACES), style="bold")
    if any(plan.spare(where) is not None for where in PLACES):
        table.add_row("limit", *(_gb(getattr(plan.limits, where)) for where in PLACES))
        table.add_row("left", *(_gb(plan.spare(where)) for where in PLACES))
    return table


def explore_table(cells: Sequence[Cell], model: str) -> Table:
    """Return a table of the share of the blocks that stays on each GPU, in percent; "no" if the run does not fit."""
    gpus = sorted({cell.gpu for cell in cells})
    table = Table(title=f"{model}: blocks that stay on the GPU (%)", title_justify="left", title_style="bold")
    for head in ("rank", "tokens", *map(show_size, gpus)):
        table.add_column(head, justify="right")
    found = {(cell.rank, cell.tokens, cell.gpu): cell for cell in cells}
    for rank, tokens in dict.fromkeys((cell.rank, cell.tokens) for cell in cells):
        table.add_row(f"{rank}", f"{tokens:,}", *(_cell(found[rank, tokens, gpu]) for gpu in gpus))
    return table


def _cell(cell: Cell) -> str:
    return "no" if cell.share is None else f"{100 * cell.share:.0f}{OFFLOADED if cell.offloads else ''}"


def plan_json(model: str, answer: Answer) -> dict[str, Any]:
    """Return bytes, limits, placements and estimates of all that was asked for."""
    found: dict[str, Any] = {"model": model, "what": answer.what, "blocks": answer.blocks, "notes": list(answer.notes)}
    found |= {"first_line": headline(answer), "run": answer.run, "speed": asdict(answer.speed)}
    if answer.quantize is not None:
        found["quantize"] = _memory_json(answer.quantize.memory) | {"time": asdict(answer.quantize.time)}
    if answer.train is not None:
        train = answer.train
        step = asdict(train.step)
        found["train"] = _memory_json(train.placed.memory) | {
            "placement": asdict(train.placed.placement),
            "longest_tokens": train.reach.tokens,
            "highest_rank": train.reach.rank,
            "advice": list(train.advice),
            "step": step | {"seconds": train.step.seconds, "tokens_per_second": train.step.tokens_per_second},
        }
    if answer.serve is not None:
        found["serve"] = _memory_json(answer.serve.placed.memory) | {
            "placement": asdict(answer.serve.placed.placement),
            "page_seconds": answer.serve.page_seconds,
        }
    if answer.gpus is not None:
        found["gpus"] = gpus_json(answer.gpus)
    if answer.cells:
        found["explore"] = [asdict(cell) for cell in answer.cells]
    return found


def lack(plan: MemoryPlan) -> str:
    """Return a sentence on how much memory a task lacks."""
    missing = (f"{show_size(-(plan.spare(where) or 0))} more {MEMORY[where]}" for where in plan.lacking)
    return f"{TITLES[plan.task]} needs {' and '.join(missing)}"


def _memory_json(plan: MemoryPlan) -> dict[str, Any]:
    return {
        "items": [asdict(item) for item in plan.items],
        "total": {where: plan.total(where) for where in PLACES},
        "limits": asdict(plan.limits),
        "left": {where: plan.spare(where) for where in PLACES},
        "fits": plan.fits,
        "notes": list(plan.notes),
    }


def _train_lines(answer: Answer, train: TrainAnswer) -> list[str]:
    step = train.step
    reach = [
        f"longest sequence that fits (tokens): {_reached(train.reach.tokens)}",
        f"highest rank that fits: {_reached(train.reach.rank)}",
    ]
    return [
        *_placement_lines(train.placed.placement, answer.blocks),
        show_activations(train.training, train.placed.placement, answer.blocks),
        *([] if train.placed.memory.limits == Limits() else reach),
        f"estimated time: {step.seconds:.2g} s per step, {step.tokens_per_second:,.0f} tokens per second "
        f"(computing {step.compute:.2g} s, decoding {step.decode:.2g} s, copying weights {step.transfer:.2g} s; "
        f"{_speed(answer.speed)})",
        *(f"advice: {sentence}" for sentence in train.advice),
    ]


def _serve_lines(answer: Answer, serve: ServeAnswer) -> list[str]:
    lines = _placement_lines(serve.placed.placement, answer.blocks)
    if serve.page_seconds:
        speed = _speed(answer.speed)
        lines.append(f"estimated time: at least {serve.page_seconds:.2g} s per token to copy weights ({speed})")
    return lines


def _placement_lines(placement: Placement, blocks: int) -> list[str]:
    """Return what stays on the GPU, and where the rest is."""
    resident = placement.resident or 0
    lines = [f"blocks that stay on the GPU: {resident} of {blocks} ({resident / blocks:.0%})"]
    if placement.shards:
        where = "on its GPU" if placement.resident is None else "in CPU memory"
        lines = [f"each of {placement.shards} processes keeps its part of every block {where}"]
    elif resident < blocks:
        where = "CPU memory" if placement.pages == "host" else "disk"
        lines.append(f"the other blocks are copied to the GPU from {where} when needed")
    if placement.embeddings_on_host:
        lines.append("the embeddings stay in CPU memory")
    if placement.activation_offload:
        lines.append("activation checkpoints are kept in CPU memory")
    return lines


def _quantize_line(found: QuantizeTime, speed: Speed) -> str:
    time = f"{found.seconds:,.0f} s" if found.seconds < 120 else f"{found.seconds / 60:,.0f} min"
    parts = f"computing {found.compute:,.0f} s while reading {found.read:,.0f} s, then writing {found.write:,.0f} s"
    return f"estimated time: {time} ({parts}; {_speed(speed)})"


def _lines(lines: Sequence[str]) -> Text:
    return Text("\n".join((*lines, "")))


def _item(num_bytes: int) -> str:
    """Return GB with three decimals; nothing for 0, and one significant digit instead of 0.000."""
    if not num_bytes:
        return ""
    return _gb(num_bytes) if num_bytes >= 500_000 else f"{num_bytes / 1e9:.1g}"


def _gb(num_bytes: int | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / 1e9:,.3f}"


def _reached(number: int | None) -> str:
    return "none" if number is None else f"{number:,}"


def _speed(speed: Speed) -> str:
    rates: tuple[Rate, ...] = (speed.flops, speed.link, speed.disk)
    flops, link, disk = (f"{rate.value / size:.3g}" for rate, size in zip(rates, (1e12, 1e9, 1e9), strict=True))
    sources = " and ".join(dict.fromkeys(rate.source for rate in rates))
    return f"{sources}: {flops} TFLOP/s, CPU to GPU {link} GB/s, disk {disk} GB/s"
