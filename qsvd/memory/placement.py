"""The placement of a task: blocks that are resident and blocks that are not recomputed, and the longest sequence."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from qsvd.memory.block_bytes import Batch
from qsvd.memory.duration import GPU, step_time
from qsvd.memory.items import PLACES, Limits, MemoryPlan, Placement, num_resident
from qsvd.memory.other_tasks import plan_serving
from qsvd.memory.split_model import SplitModelPlan
from qsvd.memory.training import Training, plan_training
from qsvd.numerics.search import last_spared, most

OFFLOADS = {"auto": (False, True), "yes": (True,), "no": (False,)}
GPU_SHARE = 0.9  # of the free memory of a GPU that a run may fill to save time: sizes vary, and memory fragments
HOST_SHARE = 0.5  # of the free CPU memory, which other programs need too
GAIN = 0.9  # a step that is at most as long as this share is worth that blocks leave the device


@dataclass(frozen=True)
class Wish:
    """What a user asks of a placement.

    Args:
        share: Share of the blocks that are resident on the device, 0 to 1, or "auto".
        offload: Whether checkpoints of activations go to CPU memory.
        unrecomputed: Number of blocks that keep their activations; "auto" is what makes the shortest step.
        batch_size: What --batch-size auto chose when the run began, which stays; None for a new run.
        shards: Number of processes that hold the residuals together; 0 if each holds all.
        offloads_parts: Whether each keeps its part in CPU memory.
    """

    share: float | Literal["auto"] = "auto"
    offload: Literal["auto", "yes", "no"] = "auto"
    unrecomputed: int | Literal["auto"] = 0
    batch_size: int | None = None
    shards: int = 0
    offloads_parts: bool = False


@dataclass(frozen=True)
class Placed:
    """A placement and its memory plan. Its `resident` is always a number."""

    placement: Placement
    memory: MemoryPlan


FREE = Wish()
Count = Callable[[Placement], MemoryPlan]


def place(model: SplitModelPlan, training: Training, limits: Limits, wish: Wish = FREE) -> Placed:
    """Return the placement of a training run with the most resident blocks that fits; if none does, the nearest one.

    Tried in this order: everything on the device; embeddings in CPU memory, if the head does not share their tensor;
    fewer resident blocks; pages on disk; checkpoints of activations in CPU memory. Where all activations may be
    recomputed and the wish is "auto", as many blocks keep them as make the shortest step.

    Raises:
        BadInput: as plan_training does.
    """
    possible = ways(model, training.batch.device, wish)
    found = _best(lambda placement: plan_training(model, training, placement, limits), possible, wish)
    device = limits.gpu if training.batch.device == "cuda" else limits.host
    is_free = wish.unrecomputed == "auto" and training.batch.checkpointing and not training.layer_major
    if not is_free or device is None or not found.memory.fits or found.placement.activation_offload:
        return found
    best = _fastest(model, training, found, wish) if model.recomputes_blocks else found.placement
    return Placed(best, plan_training(model, training, best, limits))


def _fastest(model: SplitModelPlan, training: Training, found: Placed, wish: Wish) -> Placement:
    """Return the placement with the shortest step that leaves some memory free; `found` recomputes all blocks.

    Blocks leave the device for activations only where they go to CPU memory (how fast a disk is nobody knows), and for
    a step that is much shorter by the assumed speeds. These are the same at every start.
    """
    limits, every = found.memory.limits, len(model.blocks)
    is_paged = found.placement.resident not in (None, every)
    host = limits.host if is_paged and training.batch.device == "cuda" else _share(limits.host, HOST_SHARE)
    less = Limits(_share(limits.gpu, GPU_SHARE), host)

    def count(placement: Placement) -> MemoryPlan:
        return plan_training(model, training, placement, less)

    kept = most(0, every, lambda number: count(replace(found.placement, unrecomputed=number)).fits)
    still = replace(found.placement, unrecomputed=kept or 0)
    is_bound = wish.share != "auto" or wish.shards > 0
    if training.batch.device != "cuda" or found.placement.pages != "host" or is_bound:
        return still

    def seconds(placement: Placement) -> float:
        return step_time(model, training, placement, GPU).seconds

    way = replace(found.placement, resident=every, embeddings_on_host=not model.is_tied)
    best = min((still, *_exchanged(model, training, way, count)), key=seconds)
    return best if seconds(best) <= GAIN * seconds(still) else still


def fastest_batches(model: SplitModelPlan, ways: Sequence[Training], limits: Limits, wish: Wish) -> Training:
    """Return the division of a step into batches with the shortest step of those that leave some memory free.

    Args:
        ways: Runs with the same sequences in a step, the largest batches first; the last one is taken if none fits.
    """
    is_cpu = ways[0].batch.device != "cuda"
    less = Limits(_share(limits.gpu, GPU_SHARE), _share(limits.host, HOST_SHARE) if is_cpu else limits.host)
    placed = [(training, place(model, training, less, wish)) for training in ways]
    fitting = [(training, found.placement) for training, found in placed if found.memory.fits]
    seconds = {training: step_time(model, training, placement, GPU).seconds for training, placement in fitting}
    return min(seconds, key=seconds.__getitem__, default=ways[-1])


def _exchanged(model: SplitModelPlan, training: Training, way: Placement, count: Count) -> list[Placement]:
    """Return the best placements that have resident blocks in exchange for activations.

    The more blocks keep activations, the less is computed and the more is copied. The longer of the two is shortest
    where one passes the other: at the last number with which copying is hidden, or at the next one.
    """

    @cache
    def at(number: int) -> Placed:
        return _most_resident(count, replace(way, unrecomputed=number), FREE)

    def is_hidden(number: int) -> bool:
        return at(number).memory.fits and step_time(model, training, at(number).placement, GPU).is_hidden

    last = most(0, len(model.blocks), is_hidden)
    numbers = () if last is None else range(last, min(last + 1, len(model.blocks)) + 1)
    return [at(number).placement for number in numbers if at(number).memory.fits]


def _share(num_bytes: int | None, share: float) -> int | None:
    return None if num_bytes is None else int(share * num_bytes)


def place_serving(
    model: SplitModelPlan, batch: Batch, limits: Limits, wish: Wish = FREE, *, has_head: bool = True
) -> Placed:
    """Return the same for generating text, or for a classifier, which has no output head."""
    possible = ways(model, batch.device, replace(wish, offload="no"))
    return _best(lambda placement: plan_serving(model, batch, placement, limits, has_head=has_head), possible, wish)


def can_fit(model: SplitModelPlan, training: Training, limits: Limits, wish: Wish = FREE) -> bool:
    """Return whether any placement of a training run fits."""
    return spare(model, training, limits, wish) >= 0


def spare(model: SplitModelPlan, training: Training, limits: Limits, wish: Wish = FREE) -> int:
    """Return the bytes left by the placement of a training run that leaves most, negative if none fits.

    They are those of the fullest place; 0 without limits. Only the extremes of resident blocks are tried.
    """
    every, possible = len(model.blocks), ways(model, training.batch.device, wish)
    numbers = (every, 0) if wish.share == "auto" else (num_resident(wish.share, every),)
    extremes = [replace(way, resident=resident) for way in possible for resident in numbers]
    if wish.shards:
        extremes = possible
    plans = [plan_training(model, training, placement, limits) for placement in extremes]
    left = [[size for where in PLACES if (size := plan.spare(where)) is not None] for plan in plans]
    return max(min(places, default=0) for places in left)


def ways(model: SplitModelPlan, device: str, wish: Wish) -> list[Placement]:
    """Return the placements to try, the best first, each with the most blocks that may be resident."""
    every = len(model.blocks)
    resident = every if wish.share == "auto" else num_resident(wish.share, every)
    number = 0 if wish.unrecomputed == "auto" else wish.unrecomputed
    if wish.shards:
        resident = 0 if wish.offloads_parts else None
    if device != "cuda":
        return [Placement(resident, "host" if wish.shards else "disk", unrecomputed=number, shards=wish.shards)]
    sources: tuple[Literal["host"], Literal["disk"]] = ("host", "disk")
    return [
        Placement(
            resident,
            pages,
            embeddings_on_host=not model.is_tied,
            activation_offload=offload,
            unrecomputed=0 if offload else number,
            shards=wish.shards,
        )
        for offload in OFFLOADS["no" if number and wish.offload == "auto" else wish.offload]
        for pages in sources[: 1 if wish.shards else 2]
    ]


def _best(count: Count, possible: list[Placement], wish: Wish) -> Placed:
    first = replace(possible[0], embeddings_on_host=False)
    tried = [Placed(first, count(first))]
    for way in possible:
        if tried[-1].memory.fits:
            return tried[-1]
        tried.append(_most_resident(count, way, wish))
    return tried[-1] if tried[-1].memory.fits else min(tried, key=_lack)


def _lack(placed: Placed) -> int:
    """Return how many bytes are missing, in all places together."""
    return sum(-(placed.memory.spare(where) or 0) for where in placed.memory.lacking)


def _most_resident(count: Count, way: Placement, wish: Wish) -> Placed:
    """Return the way with the most resident blocks that fit, by bisection; with none if none fit."""
    whole, every = Placed(way, count(way)), way.resident or 0
    if whole.memory.fits or wish.share != "auto" or way.shards:
        return whole
    none = replace(way, resident=0)
    best = Placed(none, count(none))
    low, high = 0, every if best.memory.fits else 0
    while high - low > 1:
        middle = replace(way, resident=(low + high) // 2)
        found = Placed(middle, count(middle))
        if found.memory.fits:
            low, best = (low + high) // 2, found
        else:
            high = (low + high) // 2
    return best


Make = Callable[[int], SplitModelPlan]  # from a rank to the model with it


@dataclass(frozen=True)
class Reach:
    """The longest sequence, at most the model's context, and the highest rank that fit; None if none does.

    Each is for the run as it is otherwise.
    """

    tokens: int | None
    rank: int | None


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Args:
        gpu: Bytes of the GPU.
        share: Share of the blocks that are resident; None if the run does not fit.
        offloads: Whether checkpoints of activations are kept in CPU memory.
    """

    rank: int
    tokens: int
    gpu: int
    share: float | None
    offloads: bool


def longest(model: SplitModelPlan, training: Training, limits: Limits, wish: Wish, context: int) -> int | None:
    """Return the tokens of the longest sequence that fits, at most `context`."""
    return last_spared(context, lambda tokens: spare(model, with_tokens(training, tokens), limits, wish))


def highest(make: Make, training: Training, limits: Limits, wish: Wish, limit: int) -> int | None:
    """Return the highest rank that fits, at most `limit`."""
    return last_spared(limit, lambda rank: spare(make(rank), training, limits, wish))


def with_tokens(training: Training, tokens: int) -> Training:
    """Return the run with sequences of another length."""
    return replace(training, batch=replace(training.batch, tokens=tokens))


def explore(
    make: Make, training: Training, host: int | None, ranks: Sequence[int], tokens: Sequence[int], cards: Sequence[int]
) -> tuple[Cell, ...]:
    """Return the share of resident blocks for each rank, length and size of a GPU in bytes (`cards`)."""
    cells = []
    for rank in ranks:
        model = make(rank)
        for length in tokens:
            for gpu in cards:
                placed = place(model, with_tokens(training, length), Limits(gpu, host), FREE)
                share = (placed.placement.resident or 0) / len(model.blocks) if placed.memory.fits else None
                cells.append(Cell(rank, length, gpu, share, placed.placement.activation_offload))
    return tuple(cells)


def advice(make: Make, rank: int, training: Training, limits: Limits, reach: Reach) -> tuple[str, ...]:
    """Return changes that make a run fit, a sentence each. Every one was tried."""
    found = [
        sentence
        for sentence, changed in _changes(training)
        if changed != training and can_fit(make(rank), changed, limits)
    ]
    if reach.tokens:
        found.append(f"--max-length {reach.tokens} fits")
    if reach.rank:
        found.append(f"--rank {reach.rank} fits")
    if found:
        return tuple(found)
    least = _least(training)
    if can_fit(make(rank), least, limits):
        return (
            "all of these together fit: --gradient-checkpointing, --batch-size 1, --optimizer paged_adamw_8bit, and "
            f"--max-length {least.batch.tokens}",
        )
    return ("no change of options is enough: take a larger GPU, more CPU memory, or a smaller model",)


def _changes(training: Training) -> tuple[tuple[str, Training], ...]:
    batch = training.batch
    return (
        ("--gradient-checkpointing fits", replace(training, batch=replace(batch, checkpointing=True))),
        ("--batch-size 1 fits", replace(training, batch=replace(batch, batch=1, is_masked=False))),
        ("--optimizer paged_adamw_8bit fits", replace(training, optimizer="paged_adamw_8bit")),
        ("--no-layer-major fits", replace(training, layer_major=False)),
    )


def _least(training: Training) -> Training:
    """Return the run with all changes that save memory, and at most 512 tokens."""
    tokens = min(training.batch.tokens, 512)
    batch = replace(training.batch, checkpointing=True, batch=1, is_masked=False, tokens=tokens)
    return replace(training, batch=batch, optimizer="paged_adamw_8bit", layer_major=False)
