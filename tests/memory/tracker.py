"""How many bytes of tensors are alive at most while something runs for real; shares no code with qsvd."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
IN_PLACE = {aten.mm.out, aten.addmm.out, aten.addmm_.default, aten.bmm.out, aten.baddbmm.out}


class Tracker(TorchDispatchMode):
    """now and peak: bytes of the storages that were made while it is on and that are not yet gone.

    Products of bfloat16 matrices are zeros of the same size: most CPUs take 10 times as long for them as for float32.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.alive: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = {t.untyped_storage().data_ptr() for t in tensors((args, *(kwargs or {}).values()))}
        made = result(func, args, kwargs or {})
        for tensor in tensors(made):
            storage = tensor.untyped_storage()
            address = storage.data_ptr()
            if address not in inputs and address not in self.alive and storage.nbytes():
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


def tensors(value):
    """Every tensor in tuples and lists."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for one in value:
            yield from tensors(one)


def result(func, args, kwargs):
    """What an operation returns, with zeros for products of bfloat16 matrices, and nothing new where it adds to one."""
    if not (args and torch.is_tensor(args[0]) and args[0].dtype == torch.bfloat16):
        return func(*args, **kwargs)
    if func in (aten.mm.default, aten.bmm.default):
        return args[0].new_zeros((*args[0].shape[:-1], args[1].shape[-1]))
    return kwargs.get("out", args[0]) if func in IN_PLACE else func(*args, **kwargs)
