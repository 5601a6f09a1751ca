"""Blocks whose frozen bytes live elsewhere and visit the device: which they are, and how their bytes lie.

A page is all frozen residuals of one block in one flat piece of bytes, so that one copy brings it. The arithmetic is
here, for the planner and for adapters/paging.py alike.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

ALIGNMENT = 256  # bytes; every tensor of a page starts at a multiple, as the vector loads of a GPU want it
SLOTS = 3  # places on the device: one page computes while the next two arrive


@dataclass(frozen=True)
class Placement:
    """What stays on the device while a model trains or serves, and where the rest waits.

    Args:
        resident: Blocks whose residuals stay on the device; None is all of them.
        pages: Where the residuals of the others are: "host" memory, or the shards on "disk", as a CPU wants it.
        embeddings_on_host: Look tokens up in host memory.
        activation_offload: Keep the checkpoints of activations in host memory.
    """

    resident: int | None = None
    pages: Literal["host", "disk"] = "host"
    embeddings_on_host: bool = False
    activation_offload: bool = False


EVERYTHING = Placement()  # on the device


def block_of(module: str) -> str:
    """The block that a module is in: "model.layers.3" for "model.layers.3.self_attn.q_proj"; or itself."""
    parts = module.split(".")
    first = next((number for number, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[: first + 1])


def padded(num_bytes: int) -> int:
    """Bytes that a tensor takes in a page."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def page_bytes(sizes: Iterable[int]) -> int:
    """Bytes of a page that holds tensors of these sizes."""
    return sum(map(padded, sizes))


def num_resident(share: float, blocks: int) -> int:
    """How many of so many blocks stay on the device when this share of them does, rounded down."""
    return int(share * blocks + 1e-9)


def resident_blocks(blocks: int, resident: int) -> frozenset[int]:
    """Which ones, by number: spread evenly, so that a page arrives while several blocks compute."""
    return frozenset(n for n in range(blocks) if (n + 1) * resident // blocks > n * resident // blocks)


def num_slots(paged: int) -> int:
    """Places on the device for so many paged blocks."""
    return min(SLOTS, paged)
