"""Frozen residuals that live in host memory or on disk and visit the device, block by block.

A page is what plan/pages.py says: the residuals of one block, in one piece. Nobody announces a visit: every linear asks
for its page when it computes, forward, again in a recomputation, and in the backward pass, and these share one visit
while they follow each other. The pager sees the order and fetches the next two pages meanwhile: upwards in a forward
pass, and from the last page down where a backward pass follows. A wrong guess costs time, never a result. Pages are
only read: nothing goes back.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qsvd.adapters.page_buffers import DiskStore, HostStore, Slot, Store, make_slots
from qsvd.errors import BadInput
from qsvd.files.pages import PageReader, free_host_memory
from qsvd.files.split_folder import SplitFolder
from qsvd.memory.items import Placement, block_of, padded, page_bytes, resident_blocks
from qsvd.numerics.codec import Codec, PackedBlocks, from_bytes


class Pager:
    """Brings pages to a device. `moved_bytes` counts what it brought."""

    def __init__(self, store: Store, device: torch.device):
        self.store, self.device = store, device
        self.moved_bytes = 0
        self._slots = make_slots(store, device)
        self._current: int | None = None
        self._upwards = True

    def visit(self, page: int, *, turns: bool) -> Tensor:
        """The page, uint8 on the device, to compute with before another one is visited.

        Args:
            turns: Whether a backward pass follows, which comes down again from the last page.
        """
        if page != self._current:
            self._move_to(page, turns=turns)
        return self._slot_of(page).room

    @property
    def num_bytes(self) -> int:
        """Of all places on the device."""
        return sum(len(slot.room) for slot in self._slots)

    def __deepcopy__(self, memo: dict) -> "Pager":
        """Itself: what is frozen is shared."""
        return self

    def _move_to(self, page: int, *, turns: bool) -> None:
        if self._current is not None:
            self._slot_of(self._current).leave()
            is_next = abs(page - self._current) == 1
            self._upwards = page > self._current if is_next else page < self._current  # from the last to the first
        self._current = None  # until it is there
        wanted = [page, *self._expected_after(page, turns=turns)]
        for number in wanted:
            if all(slot.page != number for slot in self._slots):
                next(slot for slot in self._slots if slot.page not in wanted).bring(number)
                self.moved_bytes += self.store.sizes[number]
        self._slot_of(page).wait()
        self._current = page

    def _expected_after(self, page: int, *, turns: bool) -> list[int]:
        """As many pages as there is place for beside this one."""
        count, upwards, place = len(self.store.sizes), self._upwards, page
        found: list[int] = []
        while len(found) < len(self._slots) - 1:
            if turns and place == (count - 1 if upwards else 0):
                upwards = not upwards
            place = (place + (1 if upwards else -1)) % count
            if place not in (page, *found):
                found.append(place)
        return found

    def _slot_of(self, page: int) -> Slot:
        return next(slot for slot in self._slots if slot.page == page)


@dataclass(frozen=True)
class PagedResidual:
    """One residual in a page.

    Args:
        places: Offset and bytes of each of its tensors in the page, by the names of PackedBlocks.tensors.
        nested_block: Scales that share one absmax; None where scales are not nested.
    """

    pager: Pager
    page: int
    places: dict[str, tuple[int, int]]
    shape: tuple[int, int]
    codec: Codec
    nested_block: int | None

    def read(self, *, turns: bool) -> PackedBlocks:
        """Q on the device, in views of the page, to compute with before another page is visited."""
        page = self.pager.visit(self.page, turns=turns)
        parts = {name: page[start : start + size] for name, (start, size) in self.places.items()}
        return from_bytes(parts, self.shape, self.codec, self.nested_block)


def open_pages(split: SplitFolder, device: torch.device, placement: Placement) -> dict[str, PagedResidual]:
    """The residuals of a result that do not stay on the device, by the names of their weights.

    Raises:
        BadInput: there are fewer blocks than are to stay, or the host has too little memory for the others.
    """
    blocks: dict[str, list[str]] = {}
    for name, weight in split.weights.items():
        blocks.setdefault(block_of(weight["module"]), []).append(name)
    if placement.resident is None:
        return {}
    if not 0 <= placement.resident <= len(blocks):
        raise BadInput(f"{placement.resident} resident blocks are outside 0..{len(blocks)}, those of {split.folder}")
    stay = resident_blocks(len(blocks), placement.resident)
    paged = [names for number, names in enumerate(blocks.values()) if number not in stay]
    return _open(split, paged, device, placement) if paged else {}


def _open(
    split: SplitFolder, blocks: Sequence[Sequence[str]], device: torch.device, placement: Placement
) -> dict[str, PagedResidual]:
    stored = [[split.stored(name) for name in names] for names in blocks]
    places = [_places([one.codec.parts(one.shape) for one in block]) for block in stored]
    sizes = [page_bytes(size for parts in page for _, size in parts.values()) for page in places]
    pieces = [
        {start: one.parts[part] for one, parts in zip(block, page, strict=True) for part, (start, _) in parts.items()}
        for block, page in zip(stored, places, strict=True)
    ]
    reader = PageReader(pieces)
    if placement.pages == "host":
        _check_host(sum(sizes), split)
        store: Store = HostStore(reader, sizes, pin=device.type == "cuda")
    else:
        store = DiskStore(reader, sizes)
    pager = Pager(store, device)
    return {
        name: PagedResidual(pager, page, places[page][number], one.shape, one.codec, one.nested_block)
        for page, (names, block) in enumerate(zip(blocks, stored, strict=True))
        for number, (name, one) in enumerate(zip(names, block, strict=True))
    }


def _check_host(num_bytes: int, split: SplitFolder) -> None:
    free = free_host_memory()
    if num_bytes > free:
        raise BadInput(
            f"the pages of {split.folder} take {num_bytes / 1e9:.2f} GB of host memory, and {free / 1e9:.2f} GB are "
            "free; keep more blocks on the device, or leave the pages on disk"
        )


def _places(sizes: Sequence[dict[str, int]]) -> list[dict[str, tuple[int, int]]]:
    """Offset and bytes of each tensor of each residual of a page, which lie one after the other."""
    start = 0
    found = []
    for parts in sizes:
        places = {}
        for name, size in parts.items():
            places[name] = (start, size)
            start += padded(size)
        found.append(places)
    return found
