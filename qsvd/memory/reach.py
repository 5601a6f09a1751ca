"""The longest sequence and the highest rank that fit on a machine, and what to change so that a run fits.

Bisection finds each answer, since more tokens and higher ranks always need more memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from qsvd.memory.items import Limits
from qsvd.memory.placement import FREE, Wish, can_fit, place
from qsvd.memory.split_model import SplitModelPlan
from qsvd.memory.training import Training

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


def most(least: int, limit: int, fits: Callable[[int], bool]) -> int | None:
    """Return the largest number of least..limit that fits, if all below it fit too; None if none fits."""
    if limit < least or not fits(least):
        return None
    if fits(limit):
        return limit
    low, high = least, limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def longest(model: SplitModelPlan, training: Training, limits: Limits, wish: Wish, context: int) -> int | None:
    """Return the tokens of the longest sequence that fits, at most `context`."""
    return most(1, context, lambda tokens: can_fit(model, with_tokens(training, tokens), limits, wish))


def highest(make: Make, training: Training, limits: Limits, wish: Wish, limit: int) -> int | None:
    """Return the highest rank that fits, at most `limit`."""
    return most(1, limit, lambda rank: can_fit(make(rank), training, limits, wish))


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
        found.append(f"--tokens {reach.tokens} fits")
    if reach.rank:
        found.append(f"--rank {reach.rank} fits")
    if found:
        return tuple(found)
    least = _least(training)
    if can_fit(make(rank), least, limits):
        return (
            "all of these together fit: --gradient-checkpointing, --batch 1, --optimizer paged_adamw_8bit, and "
            f"--tokens {least.batch.tokens}",
        )
    return ("no change of options is enough: take a larger GPU, more CPU memory, or a smaller model",)


def _changes(training: Training) -> tuple[tuple[str, Training], ...]:
    batch = training.batch
    return (
        ("--gradient-checkpointing fits", replace(training, batch=replace(batch, checkpointing=True))),
        ("--batch 1 fits", replace(training, batch=replace(batch, batch=1, is_masked=False))),
        ("--optimizer paged_adamw_8bit fits", replace(training, optimizer="paged_adamw_8bit")),
        ("--no-layer-major fits", replace(training, layer_major=False)),
    )


def _least(training: Training) -> Training:
    """Return the run with all changes that save memory, and at most 512 tokens."""
    tokens = min(training.batch.tokens, 512)
    batch = replace(training.batch, checkpointing=True, batch=1, is_masked=False, tokens=tokens)
    return replace(training, batch=batch, optimizer="paged_adamw_8bit", layer_major=False)
