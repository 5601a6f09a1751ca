"""A plan as tables for people and as JSON for programs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qsvd.errors import show_size
from qsvd.memory.duration import QuantizeTime, Rate, Speed, StepTime
from qsvd.memory.items import PLACES, Limits, MemoryPlan, Placement
from qsvd.memory.placement import Placed
from qsvd.memory.reach import Cell, Reach

OFFLOADED = "*"
MEMORY = {"gpu": "GPU memory", "host": "host memory", "disk": "disk"}
TITLES = {"quantize": "qsvd quantize", "train": "qsvd train", "serve": "generating text"}


@dataclass(frozen=True)
class QuantizeAnswer:
    """What is to say of splitting; the time is an estimate."""

    memory: MemoryPlan
    time: QuantizeTime


@dataclass(frozen=True)
class TrainAnswer:
    """What is to say of a training run; advice is what to change where it does not fit, the step an estimate."""

    placed: Placed
    reach: Reach
    advice: tuple[str, ...]
    step: StepTime


@dataclass(frozen=True)
class ServeAnswer:
    """What is to say of generating text; the seconds are those of all pages, which come once a token."""

    placed: Placed
    page_seconds: float


@dataclass(frozen=True)
class Answer:
    """Everything that was asked for, the rest None; what was planned, and notes about the model of so many blocks."""

    quantize: QuantizeAnswer | None
    train: TrainAnswer | None
    serve: ServeAnswer | None
    cells: tuple[Cell, ...]
    blocks: int
    speed: Speed
    what: str
    notes: tuple[str, ...]

    @property
    def memory(self) -> tuple[MemoryPlan, ...]:
        """Every plan of memory."""
        plans = (
            self.quantize and self.quantize.memory,
            self.train and self.train.placed.memory,
            self.serve and self.serve.placed.memory,
        )
        return tuple(plan for plan in plans if plan is not None)


def plan_tables(model: str, answer: Answer) -> Group:
    """A table for each task with what it means, the table of cards, and what was assumed."""
    parts: list[RenderableType] = [Text(f"{model}: {answer.what}\n")]
    if answer.quantize is not None:
        parts += [memory_table(answer.quantize.memory), _lines([_quantize_line(answer)])]
    if answer.train is not None:
        parts += [memory_table(answer.train.placed.memory), _lines(_train_lines(answer, answer.train))]
    if answer.serve is not None:
        parts += [memory_table(answer.serve.placed.memory), _lines(_serve_lines(answer, answer.serve))]
    if answer.cells:
        parts += [explore_table(answer.cells, model)]
        parts.append(
            _lines([f"{OFFLOADED} with checkpoints of activations on the host, which leaves the card more room"])
        )
    notes = dict.fromkeys((*answer.notes, *(note for plan in answer.memory for note in plan.notes)))
    return Group(*parts, *(Text(f"- {note}") for note in notes))


def memory_table(plan: MemoryPlan) -> Table:
    """One row for each item, in GB, then totals, limits and what is left."""
    lacking = " and ".join(MEMORY[where] for where in plan.lacking)
    verdict = f"does not fit: too little {lacking}" if lacking else "fits"
    if plan.limits == Limits():
        verdict = "give --gpu and --host to see whether it fits"
    table = Table(title=f"{TITLES[plan.task]}: {verdict}", title_justify="left", title_style="bold")
    table.add_column("GB")
    for where in PLACES:
        table.add_column(where, justify="right")
    for item in plan.items:
        table.add_row(item.name, *(_item(getattr(item, where)) for where in PLACES))
    table.add_section()
    table.add_row("total", *(_gb(plan.total(where)) for where in PLACES), style="bold")
    if any(plan.spare(where) is not None for where in PLACES):
        table.add_row("limit", *(_gb(getattr(plan.limits, where)) for where in PLACES))
        table.add_row("left", *(_gb(plan.spare(where)) for where in PLACES))
    return table


def explore_table(cells: Sequence[Cell], model: str) -> Table:
    """Share of the blocks that stays on each card, in percent, or "no"."""
    cards = sorted({cell.gpu for cell in cells})
    table = Table(title=f"{model}: % of the blocks that stay on a card", title_justify="left", title_style="bold")
    for head in ("rank", "tokens", *map(show_size, cards)):
        table.add_column(head, justify="right")
    found = {(cell.rank, cell.tokens, cell.gpu): cell for cell in cells}
    for rank, tokens in dict.fromkeys((cell.rank, cell.tokens) for cell in cells):
        table.add_row(f"{rank}", f"{tokens:,}", *(_cell(found[rank, tokens, card]) for card in cards))
    return table


def _cell(cell: Cell) -> str:
    if cell.share is None:
        return "no"
    return f"{100 * cell.share:.0f}{OFFLOADED if cell.offloads else ''}"


def plan_json(model: str, answer: Answer) -> dict[str, Any]:
    """Bytes, limits, placements, reach and estimates of everything that was asked for."""
    found: dict[str, Any] = {"model": model, "what": answer.what, "blocks": answer.blocks, "notes": list(answer.notes)}
    found |= {"speed": asdict(answer.speed)}
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
    if answer.cells:
        found["explore"] = [asdict(cell) for cell in answer.cells]
    return found


def lack(plan: MemoryPlan) -> str:
    """One sentence of what a task lacks."""
    missing = (f"{show_size(-(plan.spare(where) or 0))} of {MEMORY[where]}" for where in plan.lacking)
    return f"{TITLES[plan.task]} lacks {' and '.join(missing)}"


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
    return [
        *_placement_lines(train.placed.placement, answer.blocks),
        *_reach_lines(train),
        f"estimate: {step.seconds:.2g} s a step, {step.tokens_per_second:,.0f} tokens a second "
        f"(computing {step.compute:.2g} s, moving {step.transfer:.2g} s; {_speed(answer.speed)})",
        *(f"to change: {sentence}" for sentence in train.advice),
    ]


def _reach_lines(train: TrainAnswer) -> list[str]:
    if train.placed.memory.limits == Limits():
        return []
    return [
        f"longest sequence that fits: {_reached(train.reach.tokens)}",
        f"highest rank that fits: {_reached(train.reach.rank)}",
    ]


def _serve_lines(answer: Answer, serve: ServeAnswer) -> list[str]:
    lines = _placement_lines(serve.placed.placement, answer.blocks)
    if serve.page_seconds:
        lines.append(f"estimate: at least {serve.page_seconds:.2g} s a token, for what moves ({_speed(answer.speed)})")
    return lines


def _placement_lines(placement: Placement, blocks: int) -> list[str]:
    """What stays on the card and where the rest waits."""
    resident = placement.resident or 0
    lines = [f"resident blocks: {resident} of {blocks} ({resident / blocks:.0%})"]
    if resident < blocks:
        where = "host memory" if placement.pages == "host" else "the disk"
        lines.append(f"the others visit the card from {where}")
    if placement.embeddings_on_host:
        lines.append("embeddings are looked up on the host")
    if placement.activation_offload:
        lines.append("checkpoints of activations wait on the host")
    return lines


def _quantize_line(answer: Answer) -> str:
    assert answer.quantize is not None, "asked before"
    found = answer.quantize.time
    time = f"{found.seconds:,.0f} s" if found.seconds < 120 else f"{found.seconds / 60:,.0f} min"
    parts = (
        f"computing {found.compute:,.0f} s, beside it reading {found.read:,.0f} s, then writing {found.write:,.0f} s"
    )
    return f"estimate: {time} ({parts}; {_speed(answer.speed)})"


def _lines(lines: Sequence[str]) -> Text:
    return Text("\n".join((*lines, "")))


def _item(num_bytes: int) -> str:
    """GB with three decimals; nothing for nothing, and one digit of what would be shown as 0."""
    if not num_bytes:
        return ""
    return _gb(num_bytes) if num_bytes >= 500_000 else f"{num_bytes / 1e9:.1g}"


def _gb(num_bytes: int | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / 1e9:,.3f}"


def _reached(number: int | None) -> str:
    return "none" if number is None else f"{number:,}"


def _speed(speed: Speed) -> str:
    flops, link, disk = (f"{rate.value / size:.3g}" for rate, size in zip(_rates(speed), (1e12, 1e9, 1e9), strict=True))
    sources = dict.fromkeys(rate.source for rate in _rates(speed))
    return f"{' and '.join(sources)}: {flops} TFLOP/s, link {link} GB/s, disk {disk} GB/s"


def _rates(speed: Speed) -> tuple[Rate, Rate, Rate]:
    return speed.flops, speed.link, speed.disk
