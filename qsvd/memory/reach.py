"""How far a machine reaches: the longest sequence and the highest rank that fit, and what to change for a run.

Every answer is looked for by bisection, since more tokens and higher ranks only ever need more.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from qsvd.memory.items import Limits
from qsvd.memory.placement import FREE, Wish, can_fit, place
from qsvd.memory.split_model import SplitModelPlan
from qsvd.memory.training import Training

Make = Callable[[int], SplitModelPlan]  # rank -> the model with it


@dataclass(frozen=True)
class Reach:
    """What fits, the rest of a run left as it is; None where not even the least does.

    Args:
        tokens: Longest sequence, at most the model's context; None too where nothing fits.
        rank: Highest.
    """

    tokens: int | None
    rank: int | None


@dataclass(frozen=True)
class Cell:
    """One answer of a table: what share of the blocks stays on a card, or None where the run does not fit.

    offloads says that checkpoints of activations wait on the host.
    """

    rank: int
    tokens: int
    gpu: int
    share: float | None
    offloads: bool


def most(least: int, limit: int, fits: Callable[[int], bool]) -> int | None:
    """The largest number of least..limit that fits, where everything below a number that fits does; None if none."""
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
    """Tokens of the longest sequence that fits, at most the context of the model."""

    def fits(tokens: int) -> bool:
        return can_fit(model, with_tokens(training, tokens), limits, wish)

    return most(1, context, fits)


def highest(make: Make, training: Training, limits: Limits, wish: Wish, limit: int) -> int | None:
    """The highest rank that fits, at most `limit`."""
    return most(1, limit, lambda rank: can_fit(make(rank), training, limits, wish))


def with_tokens(training: Training, tokens: int) -> Training:
    """The same run on sequences of another length."""
    return replace(training, batch=replace(training.batch, tokens=tokens))


def explore(
    make: Make, training: Training, host: int | None, ranks: Sequence[int], tokens: Sequence[int], cards: Sequence[int]
) -> tuple[Cell, ...]:
    """What share of the blocks stays on each card (bytes), for each rank and length."""
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
    """Changes that make a run fit, a sentence each; every one was tried, alone or with those before it.

    Args:
        make: Of a rank, with the adapters' dtype as wished.
    """
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
    return ("nothing that can be changed is enough: take a larger card, a host with more memory, or a smaller model",)


def _changes(training: Training) -> tuple[tuple[str, Training], ...]:
    batch = training.batch
    return (
        ("--gradient-checkpointing fits", replace(training, batch=replace(batch, checkpointing=True))),
        ("--batch 1 fits", replace(training, batch=replace(batch, batch=1, is_masked=False))),
        ("--optimizer paged_adamw_8bit fits", replace(training, optimizer="paged_adamw_8bit")),
        ("--no-layer-major fits", replace(training, layer_major=False)),
    )


def _least(training: Training) -> Training:
    """Everything that saves memory at once, and sequences of at most 512 tokens."""
    batch = replace(
        training.batch, checkpointing=True, batch=1, is_masked=False, tokens=min(training.batch.tokens, 512)
    )
    return replace(training, batch=batch, optimizer="paged_adamw_8bit", layer_major=False)
