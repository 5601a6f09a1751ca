"""Fitted scales against an exhaustive search in NumPy and float64, and against the largest magnitude."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qsvd.numerics.codebook import fitted
from qsvd.numerics.names import codec_named
from qsvd.numerics.normal_float import Nesting, NormalFloat
from tests import normal_floats

NEAR = {2: 1.01, 3: 1.015, 4: 1.025}  # of the least error, found among 400 shares; measured: 1.004, 1.010, 1.018
ROUNDOFF = 1e-5  # relative, of sums in float32


def errors(blocks, scales, bits):
    """Squared error of each block at nearest levels, float64."""
    levels = normal_floats.levels(bits)
    between = (levels[:-1] + levels[1:]) / 2
    divisor = np.where(scales > 0, scales, 1)[:, None]
    chosen = levels[np.searchsorted(between, blocks / divisor)]
    return ((chosen * scales[:, None] - blocks) ** 2).sum(axis=1)


def least_errors(blocks, bits):
    """The least of 400 shares, each with the best scale for its codes."""
    levels = normal_floats.levels(bits)
    between = (levels[:-1] + levels[1:]) / 2
    largest = np.abs(blocks).max(axis=1)
    found = errors(blocks, largest, bits)
    for share in np.linspace(0.2, 1, 400):
        chosen = levels[np.searchsorted(between, blocks / (share * largest)[:, None])]
        scales = (blocks * chosen).sum(axis=1) / np.maximum((chosen**2).sum(axis=1), 1e-300)
        found = np.minimum(found, errors(blocks, scales, bits))
    return found


@pytest.mark.parametrize("block", [16, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("power", [1.0, 3.0])  # 3: heavy tails
def test_the_error_is_nearly_the_least_and_never_above_that_of_the_largest_magnitude(bits, block, power):
    noise = torch.randn(200, block, generator=torch.Generator().manual_seed(bits))
    blocks = noise.sign() * noise.abs() ** power
    largest = blocks.abs().amax(dim=1)
    exact = blocks.double().numpy()
    found = errors(exact, fitted(blocks, largest, bits).double().numpy(), bits)
    plain = errors(exact, largest.double().numpy(), bits)
    assert (found <= plain * (1 + ROUNDOFF) + ROUNDOFF).all()
    assert found.sum() < plain.sum() * 0.97
    assert found.sum() <= NEAR[bits] ** 2 * least_errors(exact, bits).sum()


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from((2, 3, 4, 8)),
    block=st.sampled_from((16, 32, 64, 128)),
    rows=st.integers(1, 9),
    columns=st.integers(1, 70),
    exponent=st.integers(-36, 37),
    nested=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_no_matrix_is_encoded_worse(bits, block, rows, columns, exponent, nested, seed):  # noqa: PLR0913  # hypothesis
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    matrix[0] = 0
    scales = Nesting(8, 64) if nested else torch.float32
    plain, fit = (NormalFloat(bits=bits, block_size=block, scales=scales, fit=fit) for fit in (False, True))
    left = [(codec.encode(matrix).decode().double() - matrix.double()).square().sum() for codec in (plain, fit)]
    norm = matrix.double().square().sum()
    allowed = 0.02 if nested else ROUNDOFF  # scales that are rounded again are not the ones that were fitted
    assert left[1] <= left[0] * (1 + allowed) + ROUNDOFF * norm
    assert fit.encode(matrix).num_bytes == plain.encode(matrix).num_bytes == plain.num_bytes((rows, columns))


def test_a_decoder_needs_not_know():
    matrix = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    packed = codec_named("nf2-64-2x64-fit").encode(matrix)
    parts = packed.tensors()
    scales = normal_floats.scales_of(parts, 96, 2, 64)
    codes = normal_floats.unpacked_bits(parts["codes"].numpy(), 2, matrix.numel())
    exact = (normal_floats.levels(2)[codes] * scales.repeat(64)).reshape(64, 96)
    assert np.abs(packed.decode().double().numpy() - exact).max() < ROUNDOFF


def test_blocks_of_zeros_and_of_one_number_are_exact():
    matrix = torch.zeros(2, 64)
    matrix[1, 5] = 3.0
    assert torch.equal(codec_named("nf2-64-fp32-fit").encode(matrix).decode(), matrix)
