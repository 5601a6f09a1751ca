"""One large layer without numbers needs what a real one does, decoded residual included."""

import pytest
import torch

from qsvd.adapters.adapter import AdapterOptions, StoredWeight
from qsvd.adapters.linear import SplitLinear
from qsvd.adapters.methods.table import METHODS
from qsvd.memory.twins import Decoding, LinearTwin, LiveBytes
from qsvd.numerics.nf4 import NormalFloat4
from tests.memory.tracker import Tracker

SHAPE = (4096, 1536)  # three bands on a CPU
TOKENS, RANK = 8, 4
NEAR = 0.01  # of the peak: pieces of a few kilobytes


def peaks(layer, x, counting):
    """Of the forward and of the backward pass."""
    x = x.requires_grad_()
    with counting:
        y = layer(x)
        forward, counting.peak = counting.peak, counting.now
        y.backward(torch.empty_like(y))
    return forward, counting.peak


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_of_several_bands_has_the_peaks_of_its_twin(dtype, double_quant):
    codec = NormalFloat4(double_quant=double_quant)
    residual = codec.encode(torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)))
    factors = torch.randn(SHAPE[0], RANK), torch.randn(RANK, SHAPE[1])
    adapter = METHODS["pissa"].start(StoredWeight(residual, *factors), AdapterOptions("pissa"), torch.Generator())
    real = peaks(SplitLinear(residual, adapter, None), torch.randn(TOKENS, SHAPE[1], dtype=dtype), Tracker())
    live = LiveBytes()
    tensors = METHODS["pissa"].tensors(SHAPE, RANK, RANK, torch.float32, torch.bfloat16)
    twin = LinearTwin(Decoding(SHAPE, codec, "cpu", live), tensors, None)
    planned = peaks(twin, torch.empty(TOKENS, SHAPE[1], dtype=dtype, device="meta"), live)
    assert planned == pytest.approx(real, rel=NEAR)
    assert real[0] > 2**21 * dtype.itemsize
