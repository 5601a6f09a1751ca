"""A memory plan: bytes by item on GPU, CPU memory (host) and disk, compared with what there is."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

RESERVE = 0.04  # share of the bytes on a GPU that is kept free for fragmentation and untracked memory
HOST_RESERVE = 300_000_000  # bytes of CPU memory for libraries that load late and for freed memory that glibc keeps
SIXTEEN_BITS = 2  # bytes of a number of the 16-bit model, and of the stored components

Where = Literal["gpu", "host", "disk"]
PLACES: tuple[Where, ...] = ("gpu", "host", "disk")


@dataclass(frozen=True)
class Item:
    """Bytes of one thing in each place."""

    name: str
    gpu: int = 0
    host: int = 0
    disk: int = 0


@dataclass(frozen=True)
class Limits:
    """Bytes available in each place; None is no limit."""

    gpu: int | None = None
    host: int | None = None
    disk: int | None = None


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by item at the moment when the task takes most.

    Args:
        task: "quantize", "train" or "serve".
        items: In the order of a table, without those that take nothing.
        notes: Assumptions, a sentence each.
    """

    task: str
    items: tuple[Item, ...]
    limits: Limits
    notes: tuple[str, ...] = field(default=())

    def total(self, where: Where) -> int:
        """Return the bytes of all items in one place."""
        return sum(getattr(item, where) for item in self.items)

    def spare(self, where: Where) -> int | None:
        """Return the bytes left in one place, negative if there are too few; None without a limit."""
        limit = getattr(self.limits, where)
        return None if limit is None else limit - self.total(where)

    @property
    def lacking(self) -> tuple[Where, ...]:
        """Places with too few bytes."""
        return tuple(where for where in PLACES if (self.spare(where) or 0) < 0)

    @property
    def fits(self) -> bool:
        return not self.lacking

    def __getitem__(self, name: str) -> Item:
        """Return the item of this name; an empty one if it takes nothing."""
        return next((item for item in self.items if item.name == name), Item(name))


def items_of(items: Iterable[Item], device: str) -> tuple[Item, ...]:
    """Return the items that take something, and the reserve on the device."""
    found = [item for item in items if item.gpu or item.host or item.disk]
    free = round(RESERVE * sum(item.gpu for item in found)) if device == "cuda" else HOST_RESERVE
    return (*found, on(device, "reserve", free))


def on(device: str, name: str, num_bytes: int) -> Item:
    """Return an item on the device that computes: GPU memory, or CPU memory if that is a CPU."""
    return Item(name, gpu=num_bytes) if device == "cuda" else Item(name, host=num_bytes)


# Offloaded blocks: which they are, and how their residuals are laid out in pages.

ALIGNMENT = 256  # bytes; every tensor of a page starts at a multiple, as the vector loads of a GPU need it
SLOTS = 3  # pages on the device: one computes while the next two arrive


@dataclass(frozen=True)
class Placement:
    """What is kept on the device while a model trains or generates, and where the rest is kept.

    Args:
        resident: Number of blocks whose residuals are kept on the device; None is all.
        pages: Where the other residuals are kept: "host" (CPU memory), or "disk" (the shards; the only way on a CPU).
        embeddings_on_host: Look tokens up in CPU memory.
        activation_offload: Keep the checkpoints of activations in CPU memory.
        unrecomputed: Number of blocks that keep their activations in training, the last ones.
        shards: Number of processes that hold the residuals together, each a part of every block (FSDP2); 0 if each
            holds all. The parts are kept on the device if `resident` is None, else in CPU memory.
    """

    resident: int | None = None
    pages: Literal["host", "disk"] = "host"
    embeddings_on_host: bool = False
    activation_offload: bool = False
    unrecomputed: int = 0
    shards: int = 0


EVERYTHING = Placement()  # everything on the device


def block_of(module: str) -> str:
    """Return the block of a module: "model.layers.3" for "model.layers.3.self_attn.q_proj"; else the module itself."""
    parts = module.split(".")
    first = next((number for number, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[: first + 1])


def padded(num_bytes: int) -> int:
    """Return the bytes that a tensor takes in a page."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def page_bytes(sizes: Iterable[int]) -> int:
    """Return the bytes of a page that holds tensors of these sizes."""
    return sum(map(padded, sizes))


def all_of(blocks: int) -> str:
    """Return "all 32 blocks" in words for this number."""
    return "the only block" if blocks == 1 else f"all {blocks} blocks"


def num_resident(share: float, blocks: int) -> int:
    """Return how many blocks are this share of them, rounded down."""
    return int(share * blocks + 1e-9)


def resident_blocks(blocks: int, resident: int) -> frozenset[int]:
    """Return the numbers of the resident blocks, spread evenly, so that a page arrives while several blocks compute."""
    return frozenset(n for n in range(blocks) if (n + 1) * resident // blocks > n * resident // blocks)


def num_slots(paged: int) -> int:
    """Return how many pages are on the device at a time, of so many."""
    return min(SLOTS, paged)
