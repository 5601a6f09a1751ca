"""VeRA: random factors that all layers share, scaled by two trained vectors. Shape suffixes as in adapter.py."""

import hashlib
import math
from dataclasses import dataclass, replace
from typing import Annotated
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor, nn

from qsvd.adapters.adapter import AdapterOptions, Defaults, StoredWeight
from qsvd.adapters.methods.added import Added, joined
from qsvd.errors import BadInput
from qsvd.option_types import FROM_ZERO, Help
from qsvd.plan.tensors import AdapterTensors, TensorShape

BITS = 24  # of a float32's significand: each integer of so many bits is exact
SHIFT = np.uint64(64 - BITS)
AT_ONCE = 1 << 22  # numbers that are drawn at a time, in 8 bytes each
_drawn: WeakValueDictionary[tuple[object, ...], Tensor] = WeakValueDictionary()


@dataclass(frozen=True, kw_only=True)
class VeraOptions:
    """The options of VeRA's own."""

    d_initial: Annotated[float, FROM_ZERO, Help("Start of the trained vector d.")] = 0.1


def shared_draw(rows: int, columns: int, seed: int, like: Tensor, name: str = "vera") -> Tensor:
    """Return a random matrix [rows, columns] by Kaiming's bound, in the dtype and on the device of `like`.

    All weights with the same sizes, seed and name get the same tensor. A run does not store it, so no library may
    change it in a later version: it is made of the integers of PCG64, a sequence that is defined.
    """
    key = (name, rows, columns, seed, like.dtype, like.device)
    found = _drawn.get(key)
    if found is None:
        digest = hashlib.sha256(f"{name} {seed} {rows} {columns}".encode()).digest()
        integers = np.random.PCG64(int.from_bytes(digest[:16]))
        found = like.new_empty(rows, columns)
        height = max(1, AT_ONCE // columns)
        for start in range(0, rows, height):
            band = found[start : start + height]
            raw = integers.random_raw(band.numel()).reshape(band.shape)
            uniform = torch.from_numpy((raw >> SHIFT).astype(np.float32)) * 2.0 ** (1 - BITS) - 1
            band.copy_(uniform / math.sqrt(columns))
        _drawn[key] = found
    return found


class Vera(Added):
    """VeRA (arXiv:2310.11454, equation 2): W' = Q + B0 A0 + diag(b) B diag(d) A, with b [O] from 0 and d [K] trained.

    A [K, I] and B [O, K] are random, frozen, and the same in all layers with these sizes; the authors draw one pair
    for the largest sizes and cut it. Parameters: K + O.
    """

    paper = "2310.11454"
    starts_as = "zero, added"
    defaults = Defaults(
        rank=256,
        scale=1.0,
        learning_rate=4e-3,
        reason="the authors' rank for Llama 2 7B; few parameters are trained, so a higher rate works; not measured",
    )
    options = VeraOptions

    def __init__(self, stored: StoredWeight, rank: int, options: AdapterOptions):
        super().__init__(stored, scale=1.0)
        (rows, columns), like = stored.residual.shape, stored.up_OR
        self.register_buffer("shared_up", shared_draw(rows, rank, options.seed, like), persistent=False)
        self.register_buffer("shared_down", shared_draw(rank, columns, options.seed, like), persistent=False)
        dtype, start = options.torch_dtype, self.own(options).d_initial
        self.b = nn.Parameter(torch.zeros(rows, dtype=dtype, device=like.device))
        self.d = nn.Parameter(torch.full((rank,), start, dtype=dtype, device=like.device))

    @classmethod
    def start(cls, stored: StoredWeight, options: AdapterOptions, generator: torch.Generator) -> "Vera":
        del generator  # it is the weight's own
        if options.alpha not in (None, cls.defaults.rank_of(options, stored.rank)):  # which is a scale of 1
            raise BadInput(f"alpha {options.alpha:g} has no use in vera, whose vectors are its scale: leave it out")
        rank, _ = cls.size(stored, options)
        return cls(stored, rank, options)

    @classmethod
    def tensors(
        cls, shape: tuple[int, int], stored_rank: int, rank: int, dtype: torch.dtype, stored_dtype: torch.dtype
    ) -> AdapterTensors:
        (rows, columns), rank = shape, min(rank, *shape)
        parameters = {"b": TensorShape((rows,), dtype), "d": TensorShape((rank,), dtype)}
        shared = {
            "shared_up": TensorShape((rows, rank), stored_dtype),
            "shared_down": TensorShape((rank, columns), stored_dtype),
        }
        found = joined(shape, stored_rank, parameters, rank, (dtype, stored_dtype))
        kept = {"scaled": TensorShape((rows, rank), dtype)}  # B times b, for the gradient of d
        if stored_dtype != dtype:
            kept["exact"] = TensorShape((rows, rank), dtype)
            kept["down"] = found.made.get("down", TensorShape((rank, columns), dtype))
        return replace(found, shared=shared, made={**found.made, **kept})

    def added(self) -> tuple[Tensor, Tensor]:
        up_OK = self.b[:, None] * self.get_buffer("shared_up").to(self.b) * self.d
        return up_OK, self.get_buffer("shared_down").to(self.b)


METHOD = Vera
