"""A quantized matrix in bands of rows is the matrix."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qsvd.numerics.nf4 import NormalFloat4

SHAPES = [(70, 172), (172, 70), (33, 64), (3, 5), (1, 1), (64, 1), (129, 96), (5, 200)]


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("most", [1, 64, 3000, 10**9])
def test_the_bands_decode_to_the_matrix(double_quant, most):
    for shape in SHAPES:
        codec = NormalFloat4(double_quant=double_quant)
        packed = codec.encode(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
        bands = list(packed.in_rows(most))
        assert [row for rows, _ in bands for row in range(rows.start, rows.stop)] == list(range(shape[0]))
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(torch.cat([band.decode(dtype=dtype) for _, band in bands]), packed.decode(dtype=dtype))


@given(rows=st.integers(1, 200), columns=st.integers(1, 200), most=st.integers(1, 40_000))
def test_a_band_is_no_larger_than_asked_unless_its_blocks_need_it(rows, columns, most):
    packed = NormalFloat4(double_quant=False).encode(torch.ones(rows, columns))
    least = next(count for count in range(1, 65) if count * columns % 64 == 0)  # rows that end with a block
    for found, band in packed.in_rows(most):
        assert band.shape == (found.stop - found.start, columns)
        assert found.start % least == 0
        assert found.stop - found.start <= max(most // columns, least)
