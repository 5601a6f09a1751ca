"""Codes in bytes against NumPy's bits, most significant first."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qsvd.numerics import codebook
from qsvd.numerics.codec import pack, packed_bytes, unpack
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
