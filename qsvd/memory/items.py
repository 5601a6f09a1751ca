"""A plan of memory: bytes by item on GPU, host and disk, against what there is."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

RESERVE = 0.04  # of the bytes on a GPU: holes between pieces of memory, and what no plan sees
HOST_RESERVE = 300_000_000  # bytes on a CPU: libraries that load late, and memory that is kept though it is free

Where = Literal["gpu", "host", "disk"]
PLACES: tuple[Where, ...] = ("gpu", "host", "disk")


@dataclass(frozen=True)
class Item:
    """Bytes of one thing, by where they are."""

    name: str
    gpu: int = 0
    host: int = 0
    disk: int = 0


@dataclass(frozen=True)
class Limits:
    """Bytes that there are; None is no limit."""

    gpu: int | None = None
    host: int | None = None
    disk: int | None = None


@dataclass(frozen=True)
class MemoryPlan:
    """What is where at the moment of most bytes.

    Args:
        task: "quantize", "train" or "serve".
        items: In the order of a table; what takes nothing is left out.
        limits: What there is.
        notes: What was assumed, a sentence each.
    """

    task: str
    items: tuple[Item, ...]
    limits: Limits
    notes: tuple[str, ...] = field(default=())

    def total(self, where: Where) -> int:
        """Bytes of all items in one place."""
        return sum(getattr(item, where) for item in self.items)

    def spare(self, where: Where) -> int | None:
        """Bytes left in one place, negative where they lack; None where there is no limit."""
        limit = getattr(self.limits, where)
        return None if limit is None else limit - self.total(where)

    @property
    def lacking(self) -> tuple[Where, ...]:
        """Places that have too little."""
        return tuple(where for where in PLACES if (self.spare(where) or 0) < 0)

    @property
    def fits(self) -> bool:
        return not self.lacking

    def __getitem__(self, name: str) -> Item:
        """The item of this name; zeros where it takes nothing."""
        return next((item for item in self.items if item.name == name), Item(name))


def items_of(items: Iterable[Item], device: str) -> tuple[Item, ...]:
    """Those that take something, and what is left free beside them on the device."""
    found = [item for item in items if item.gpu or item.host or item.disk]
    free = round(RESERVE * sum(item.gpu for item in found)) if device == "cuda" else HOST_RESERVE
    return (*found, on(device, "reserve", free))


def on(device: str, name: str, num_bytes: int) -> Item:
    """An item on the device that computes: of a CPU, that is the host."""
    return Item(name, gpu=num_bytes) if device == "cuda" else Item(name, host=num_bytes)


# Blocks whose frozen bytes live elsewhere and visit the device: which they are, and how their bytes lie.


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
