"""A cache on the GPU for residuals that are kept in CPU memory or on disk, filled block by block.

A page holds the residuals of one block in one piece (memory/items.py). Every linear layer asks for its page when it
computes: in the forward pass, in a recomputation, and in the backward pass. The cache sees the order of the requests
and fetches the next pages meanwhile. A wrong guess costs time and never changes a result. Pages are only read.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qsvd.adapters.pages.buffers import DiskStore, HostStore, Slot, Store, make_slots
from qsvd.adapters.pages.sharded import ShardedPages
from qsvd.errors import BadInput
from qsvd.files.readers import PageReader
from qsvd.files.split_folder import SplitFolder
from qsvd.memory.device import free_host_memory
from qsvd.memory.items import Placement, block_of, padded, page_bytes, resident_blocks
from qsvd.numerics.codec import Codec, PackedBlocks, from_bytes


def next_pages(page: int, ascending: bool, count: int, capacity: int, *, backward_follows: bool) -> list[int]:
    """Return the pages to fetch while `page` computes, the next one first.

    Args:
        ascending: Whether the pages were last asked for in ascending order.
        count: How many pages there are.
        capacity: How many to return at most.
        backward_follows: Whether a backward pass follows the forward pass.
    """
    found: list[int] = []
    following = page
    while len(found) < min(capacity, count - 1):
        # Training goes up to the last page and comes down again. Without a backward pass, the last page is followed by
        # the first one (the remainder below): the next token, or the next batch.
        if backward_follows and following == (count - 1 if ascending else 0):
            ascending = not ascending
        following = (following + (1 if ascending else -1)) % count
        if following not in (page, *found):
            found.append(following)
    return found


class PageCache:
    """Pages on a device. `moved_bytes` counts the bytes that were copied there."""

    def __init__(self, store: Store, device: torch.device):
        self.store = store
        self.moved_bytes = 0
        self._slots = make_slots(store, device)
        self._current: int | None = None
        self._ascending = True

    def get(self, page: int, *, backward_follows: bool) -> Tensor:
        """Return a page, uint8 on the device, valid until another page is asked for.

        Args:
            backward_follows: Whether a backward pass follows, which asks for the pages in descending order.
        """
        if page != self._current:
            self._move_to(page, backward_follows=backward_follows)
        return self._slot_of(page).buffer

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers on the device."""
        return sum(len(slot.buffer) for slot in self._slots)

    def __deepcopy__(self, memo: dict) -> "PageCache":
        """Return itself: frozen residuals are shared."""
        return self

    def _move_to(self, page: int, *, backward_follows: bool) -> None:
        if self._current is not None:
            # All work with the old page is queued by now, so that its buffer may be filled again behind that work.
            self._slot_of(self._current).release()
            # A neighbour shows the direction. Any other page is a jump to the other end, where the next pass begins in
            # the direction away from it: from the last page to the first one means that a forward pass begins again.
            is_neighbour = abs(page - self._current) == 1
            self._ascending = page > self._current if is_neighbour else page < self._current
        self._current = None  # until the page has arrived: after an error the next call must fetch it again
        following = next_pages(
            page, self._ascending, len(self.store.sizes), len(self._slots) - 1, backward_follows=backward_follows
        )
        wanted = [page, *following]
        for number in wanted:
            if all(slot.page != number for slot in self._slots):
                # There are as many slots as wanted pages, so that one of them holds none of these and can be filled.
                next(slot for slot in self._slots if slot.page not in wanted).prefetch(number)
                self.moved_bytes += self.store.sizes[number]
        self._slot_of(page).wait()
        self._current = page

    def _slot_of(self, page: int) -> Slot:
        return next(slot for slot in self._slots if slot.page == page)


@dataclass(frozen=True)
class PagedResidual:
    """One residual in a page.

    Args:
        places: Offset and bytes of each of its tensors in the page, by the names of PackedBlocks.tensors.
        nested_block: Scales that share one absmax; None where scales are not nested.
    """

    cache: PageCache | ShardedPages
    page: int
    places: dict[str, tuple[int, int]]
    shape: tuple[int, int]
    codec: Codec
    nested_block: int | None

    def read(self, *, backward_follows: bool) -> PackedBlocks:
        """Return Q on the device, in views of the page, valid until another page is asked for."""
        page = self.cache.get(self.page, backward_follows=backward_follows)
        parts = {name: page[start : start + size] for name, (start, size) in self.places.items()}
        return from_bytes(parts, self.shape, self.codec, self.nested_block)


def open_pages(split: SplitFolder, device: torch.device, placement: Placement) -> dict[str, PagedResidual]:
    """Return the residuals of a quantized model that are not resident on the device, by the names of their weights.

    Raises:
        BadInput: there are fewer blocks than shall be resident, or too little CPU memory for the others.
    """
    if placement.resident is None and not placement.shards:
        return {}
    blocks: dict[str, list[str]] = {}
    for name, weight in split.weights.items():
        blocks.setdefault(block_of(weight["module"]), []).append(name)
    number = 0 if placement.shards else placement.resident or 0
    if not 0 <= number <= len(blocks):
        raise BadInput(f"{number} resident blocks are outside 0..{len(blocks)}, those of {split.folder}")
    resident = resident_blocks(len(blocks), number)
    paged = [names for number, names in enumerate(blocks.values()) if number not in resident]
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
    cache = _cache(PageReader(pieces), sizes, split, device, placement)
    return {
        name: PagedResidual(cache, page, places[page][number], one.shape, one.codec, one.nested_block)
        for page, (names, block) in enumerate(zip(blocks, stored, strict=True))
        for number, (name, one) in enumerate(zip(names, block, strict=True))
    }


def _cache(
    reader: PageReader, sizes: Sequence[int], split: SplitFolder, device: torch.device, placement: Placement
) -> PageCache | ShardedPages:
    if placement.pages == "disk" and not placement.shards:
        return PageCache(DiskStore(reader, sizes), device)
    if placement.resident is not None:
        _check_memory(sum(sizes) // max(placement.shards, 1), split, placement)
    if placement.shards:
        return ShardedPages(reader, sizes, device, in_host=placement.resident is not None)
    return PageCache(HostStore(reader, sizes, device), device)


def _check_memory(num_bytes: int, split: SplitFolder, placement: Placement) -> None:
    free = free_host_memory()
    if num_bytes > free:
        instead = "keep more blocks on the GPU, or leave them on disk"
        if placement.shards:
            instead = "start more processes, or give --shard yes"
        raise BadInput(
            f"the offloaded blocks of {split.folder} take {num_bytes / 1e9:.2f} GB of CPU memory, and "
            f"{free / 1e9:.2f} GB are free; {instead}"
        )


def _places(sizes: Sequence[dict[str, int]]) -> list[dict[str, tuple[int, int]]]:
    """Return offset and bytes of each tensor of each residual in a page, one after the other."""
    start = 0
    found = []
    for parts in sizes:
        places = {}
        for name, size in parts.items():
            places[name] = (start, size)
            start += padded(size)
        found.append(places)
    return found
