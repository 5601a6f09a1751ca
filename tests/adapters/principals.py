"""What the tests of one weight start from, and the dense formula they judge by.

Shape suffixes: T = tokens, O = out features, I = in features, R = stored rank, K = rank of the adapter's factors.
"""

import math

import torch
from torch import nn

from qsvd.adapters.adapter import Adapter, Defaults, StoredWeight
from qsvd.numerics.codec import NestedScales
from qsvd.numerics.nf4 import NormalFloat4
from tests import reference
from tests.gradients import vectors

SHAPES = ((70, 172), (64, 128), (33, 64), (172, 7), (3, 5), (1, 1))  # blocks cross rows in the first, odd ends follow
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}  # each rounds within, relatively


def packed_residual(shape, *, double_quant=False, seed=0):
    """Q of a Gaussian matrix whose rows differ in size."""
    matrix = torch.from_numpy(reference.gaussian(*shape, seed=seed)) * torch.linspace(0.5, 2, shape[0])[:, None]
    return NormalFloat4(double_quant=double_quant).encode(matrix)


def decoded(residual):
    """Q by definition, float64 [O, I]: the float32 product of level and scale."""
    scales = residual.scales.decode() if isinstance(residual.scales, NestedScales) else residual.scales
    indices = reference.unpacked(residual.codes.cpu().numpy(), residual.shape[0] * residual.shape[1])
    by_definition = reference.nf4_decode(indices, scales.cpu().numpy(), residual.shape, residual.codec.block_size)
    return torch.from_numpy(by_definition).float().double()


def principal_of(shape, rank, *, dtype=torch.float32, double_quant=False, seed=0):
    """A residual and random factors, and orthonormal vectors for those of a gradient."""
    up, down = (
        torch.from_numpy(reference.gaussian(*size, seed=seed + 1)) for size in ((shape[0], rank), (rank, shape[1]))
    )
    residual = packed_residual(shape, double_quant=double_quant, seed=seed)
    return StoredWeight(residual, up.to(dtype), down.to(dtype), gradient=vectors(shape, max(shape)))


def even(side):
    """2 where that divides a side of a weight, otherwise 1."""
    return 2 - side % 2


def own_options(method, shape):
    """Options of the method's own that a weight of this shape needs."""
    rows, columns = shape
    return {
        "melora": {"blocks": math.gcd(rows, columns)},
        "kron-lora": {"kron_out": even(rows), "kron_in": even(columns)},
        "lora-mini": {"outer_out": 6, "outer_in": 5},
    }.get(method, {})


class Given(Adapter):
    """Factors, and if wanted a gain, that are trained as they are."""

    defaults = Defaults(rank=None, scale=1.0, learning_rate=1e-3, reason="none is needed")

    def __init__(self, shape, rank, *, has_gain, seed=1):
        super().__init__()
        up, down, gain = (
            torch.from_numpy(reference.gaussian(*size, seed=seed))
            for size in ((shape[0], rank), (rank, shape[1]), (1, shape[0]))
        )
        self.up, self.down = nn.Parameter(up), nn.Parameter(down)
        self.factor = nn.Parameter(gain[0]) if has_gain else None

    start = tensors = None  # not a method that can be chosen

    def factors(self):
        return self.up, self.down

    def gain(self, read):
        del read
        return self.factor


def dense_output(x, residual, up, down, gain=None, bias=None):
    """gain * (x (Q + up down)^T) + bias, by way of the dense weight."""
    output = x @ (residual + up @ down).T
    output = output if gain is None else output * gain
    return output if bias is None else output + bias
