"""Codes in bytes against NumPy's bits, most significant first; bands of rows against the matrix."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qsvd.numerics import codebook
from qsvd.numerics.codec import pack, packed_bytes, unpack
from qsvd.numerics.nf4 import NormalFloat4
from tests import normal_floats


@given(st.sampled_from(normal_floats.BITS), st.integers(0, 70), st.integers(0, 2**32 - 1))
def test_codes_lie_bit_after_bit_and_come_back(bits, count, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, count, dtype=np.uint8)
    packed = pack(torch.from_numpy(codes), bits)
    stream = np.unpackbits(codes[:, None], axis=1)[:, 8 - bits :].reshape(-1)
    assert packed.dtype == torch.uint8
    assert len(packed) == packed_bytes(count, bits) == -(-len(stream) // 8)
    assert np.array_equal(packed.numpy(), np.packbits(stream))  # which fills with zeros
    assert np.array_equal(unpack(packed, bits, count).numpy(), codes)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_what_is_left_of_the_last_byte_holds_the_filler(bits):
    for count in range(1, 9):
        codes, filler = np.arange(count, dtype=np.uint8) % 2**bits, 2 ** (bits - 1) - 1
        whole = normal_floats.packed_bits(np.append(codes, np.full(8, filler, np.uint8)), bits)
        expected = whole[: packed_bytes(count, bits)]
        assert np.array_equal(pack(torch.from_numpy(codes), bits, filler=filler).numpy(), expected)


@given(st.sampled_from(normal_floats.BITS), st.integers(0, 70), st.integers(0, 2**32 - 1))
def test_a_table_finds_the_levels_of_packed_codes(bits, count, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, count, dtype=np.uint8)
    found = codebook.look_up(torch.from_numpy(normal_floats.packed_bits(codes, bits)), bits, count)
    assert found.dtype == torch.float32
    assert np.array_equal(found.numpy(), normal_floats.levels(bits)[codes].astype(np.float32))


@pytest.mark.parametrize("bits", normal_floats.BITS)
def test_every_code_is_in_the_table_wherever_it_lies(bits):
    rng = np.random.default_rng(bits)
    codes = np.concatenate([np.roll(np.arange(2**bits, dtype=np.uint8), rng.integers(256)) for _ in range(64)])
    rng.shuffle(codes)
    found = codebook.look_up(torch.from_numpy(normal_floats.packed_bits(codes, bits)), bits, len(codes))
    assert np.array_equal(found.numpy(), normal_floats.levels(bits)[codes].astype(np.float32))


SHAPES = [(70, 172), (172, 70), (33, 64), (3, 5), (1, 1), (64, 1), (129, 96), (5, 200), (300, 128)]


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("most", [1, 64, 3000, 20_000, 10**9])
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
