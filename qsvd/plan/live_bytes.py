"""How many bytes of tensors are alive while something runs on the meta device: exact, and without the memory."""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts storages that are made while it is on; those that were there before are not counted.

    now and peak are in bytes; marked_at_peak is what of the peak was made inside `marking`.
    """

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self.now = self.peak = self.marked_at_peak = 0
        self._marked = 0
        self._is_marking = False
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def restart(self) -> None:
        """Take the peak from here on."""
        self.peak, self.marked_at_peak = self.now, self._marked

    @contextmanager
    def marking(self) -> Iterator[None]:
        """Mark what is made inside."""
        self._is_marking = True
        yield
        self._is_marking = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in self._seen:
                self._seen.add(leaf.untyped_storage()._cdata)  # made outside
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        size, is_marked = storage.nbytes(), self._is_marking
        self.now += size
        self._marked += size * is_marked
        if self.now > self.peak:
            self.peak, self.marked_at_peak = self.now, self._marked
        weakref.finalize(storage, self._gone, key, size, is_marked)

    def _gone(self, key: int, size: int, is_marked: bool) -> None:
        self._seen.discard(key)
        self.now -= size
        self._marked -= size * is_marked
