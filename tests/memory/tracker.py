"""How many bytes of tensors are alive at most while something runs for real; shares no code with qsvd."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class Tracker(TorchDispatchMode):
    """now and peak: bytes of the storages that were made while it is on and that are not yet gone."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.alive: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = {t.untyped_storage().data_ptr() for t in tree_flatten((args, kwargs))[0] if torch.is_tensor(t)}
        made = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(made)[0]:
            if torch.is_tensor(tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in inputs | self.alive.keys() and storage.nbytes():
                    self.born(storage)
        return made

    def born(self, storage):
        address = storage.data_ptr()
        self.alive[address] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.died, address)

    def died(self, address):
        self.now -= self.alive.pop(address)
