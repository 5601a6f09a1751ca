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
