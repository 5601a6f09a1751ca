"""NF4 decoded to half precision: the float32 matrix, rounded once."""

import itertools

import pytest
import torch

from qsvd.numerics import nf4
from qsvd.numerics.nf4 import NormalFloat4
from tests import reference

SHAPES = ((1, 1), (1, 63), (3, 64), (7, 9), (70, 172), (172, 64), (300, 65), (5, 13), (128, 33))
HALVES = (torch.bfloat16, torch.float16)


def packed_matrix(shape, *, double_quant):
    """Of numbers from some that float16 holds as denormals to some near its largest."""
    matrix = torch.from_numpy(reference.gaussian(*shape)) * torch.logspace(-7, 4, shape[0])[:, None]
    return NormalFloat4(double_quant=double_quant).encode(matrix)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_rounds_once_from_float32(shape, dtype, monkeypatch):
    for run, double_quant in itertools.product([64, 192, 1 << 19], [False, True]):
        monkeypatch.setattr(nf4, "RUN", run)
        packed = packed_matrix(shape, double_quant=double_quant)
        decoded = packed.decode(dtype=dtype)
        assert (decoded.dtype, tuple(decoded.shape)) == (dtype, shape)
        assert torch.equal(decoded, packed.decode().to(dtype))
        assert packed.decode().dtype == torch.float32


@pytest.mark.parametrize("dtype", HALVES)
def test_a_matrix_of_several_real_runs_and_a_short_last_block(dtype):
    packed = packed_matrix((1500, 701), double_quant=True)
    assert torch.equal(packed.decode(dtype=dtype), packed.decode().to(dtype))


@pytest.mark.parametrize("shape", SHAPES)
def test_float64_holds_the_float32_numbers(shape):
    packed = packed_matrix(shape, double_quant=True)
    assert torch.equal(packed.decode(dtype=torch.float64), packed.decode().double())


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_buffers_dtype_stands_above_the_one_asked_for(dtype):
    packed = packed_matrix((7, 100), double_quant=False)
    buffer = torch.full((7, 100), torch.nan, dtype=dtype)
    assert packed.decode(out=buffer, dtype=torch.float64) is buffer
    assert torch.equal(buffer, packed.decode().to(dtype))


@pytest.mark.parametrize("dtype", HALVES)
def test_decoding_writes_to_nothing_else(dtype):
    packed = packed_matrix((70, 172), double_quant=False)
    before = packed.codes.clone(), packed.scales.clone()
    packed.decode(dtype=dtype)
    assert torch.equal(packed.codes, before[0])
    assert torch.equal(packed.scales, before[1])
