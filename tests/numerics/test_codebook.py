"""The levels of NormalFloat by SciPy, the nearest by brute force, and fitted scales by exhaustive search."""

import bitsandbytes.functional as bitsandbytes
import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qsvd.numerics import codebook
from qsvd.numerics.codebook import fitted
from qsvd.numerics.names import codec_named
from qsvd.numerics.normal_float import Nesting, NormalFloat
from tests import normal_floats, reference

UNIT = 2.0**-24  # float32 rounds within this, relatively
CPU = torch.device("cpu")


def levels(bits):
    return codebook.levels(bits, CPU).numpy()


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_levels_are_the_quantiles_of_the_papers_rounded_once_from_float64(bits):
    assert np.array_equal(levels(bits), normal_floats.quantile_levels(bits).astype(np.float32))


@pytest.mark.parametrize("bits", normal_floats.BITS)
def test_the_construction_is_the_papers_in_float64(bits):
    assert codebook.constructed(bits).numpy() == pytest.approx(normal_floats.quantile_levels(bits), abs=1e-14)


def test_four_bits_are_bitsandbytes_levels_to_the_bit():
    assert np.array_equal(levels(4), bitsandbytes.get_4bit_type("nf4", device="cpu").numpy())
    assert np.array_equal(levels(4).astype(np.float64), reference.NF4_LEVELS)


def test_bitsandbytes_levels_are_the_construction_with_float32_probabilities():
    """Why they are not rounded once: 1 - delta to seven digits, float32 probabilities, and a division in float32."""
    above = scipy.stats.norm.ppf(torch.linspace(0.9677083, 0.5, 9)[:-1].numpy()).astype(np.float32)
    below = -scipy.stats.norm.ppf(torch.linspace(0.9677083, 0.5, 8)[:-1].numpy()).astype(np.float32)
    found = np.sort(np.concatenate((below, np.float32([0]), above)))
    assert np.array_equal(levels(4), found / found.max())
    once = normal_floats.quantile_levels(4).astype(np.float32)
    off = np.abs(levels(4).astype(np.float64) - once)
    assert (off > 0).sum() == 12
    assert off.max() == 3 * UNIT  # 1.8e-7


@pytest.mark.parametrize("bits", normal_floats.BITS)
def test_levels_rise_from_minus_one_by_an_exact_zero_to_one(bits):
    found = levels(bits)
    assert found.dtype == np.float32
    assert len(found) == 2**bits
    assert (np.diff(found) > 0).all()
    assert (found[0], found[2 ** (bits - 1) - 1], found[-1]) == (-1, 0, 1)


@pytest.mark.parametrize("bits", normal_floats.BITS)
def test_the_nearest_level_of_values_of_every_kind(bits):
    values = np.random.default_rng(bits).uniform(-1.2, 1.2, 20_000).astype(np.float32)
    values = np.concatenate((values, values / 1e6, np.float32([0, -0.0, 1e30, -1e30, 65519, 65520, np.inf, -np.inf])))
    codes = codebook.nearest(torch.from_numpy(values), bits).numpy()
    finite = np.clip(values, -2, 2).astype(np.float64)  # beyond that the ends are nearest
    assert codes.dtype == np.uint8
    distance = np.abs(finite[:, None] - levels(bits))
    assert (distance[np.arange(len(codes)), codes] <= distance.min(axis=1) + UNIT).all()


@pytest.mark.parametrize("bits", normal_floats.BITS)
def test_a_value_on_a_boundary_takes_the_lower_code_and_the_next_one_the_higher(bits):
    between = (levels(bits)[:-1] + levels(bits)[1:]) / 2
    for values, step in (
        (between, 0),
        (np.nextafter(between, np.float32(-2)), 0),
        (np.nextafter(between, np.float32(2)), 1),
    ):
        found = codebook.nearest(torch.from_numpy(values), bits).numpy()
        assert np.array_equal(found, np.arange(len(between)) + step)


@pytest.mark.parametrize("bits", normal_floats.BITS)
def test_every_float32_near_a_boundary_is_decided_as_a_search_decides_it(bits):
    """Across the half-precision numbers around each boundary; and so the GPU's search finds the same codes."""
    between = (levels(bits)[:-1] + levels(bits)[1:]) / 2
    sweeps = np.concatenate([np.linspace(b - abs(b) / 400, b + abs(b) / 400, 999, dtype=np.float32) for b in between])
    expected = np.searchsorted(between, sweeps, side="left")
    assert np.array_equal(codebook.nearest(torch.from_numpy(sweeps), bits).numpy(), expected)
    assert np.array_equal(torch.bucketize(torch.from_numpy(sweeps), codebook.boundaries(bits, CPU)).numpy(), expected)


NEAR = {2: 1.01, 3: 1.015, 4: 1.025}  # of the least error, found among 400 shares; measured: 1.004, 1.010, 1.018
ROUNDOFF = 1e-5  # relative, of sums in float32


def errors(blocks, scales, bits):
    """Squared error of each block at nearest levels, float64."""
    levels_L = normal_floats.levels(bits)
    between = (levels_L[:-1] + levels_L[1:]) / 2
    divisor = np.where(scales > 0, scales, 1)[:, None]
    chosen = levels_L[np.searchsorted(between, blocks / divisor)]
    return ((chosen * scales[:, None] - blocks) ** 2).sum(axis=1)


def least_errors(blocks, bits):
    """The least of 400 shares, each with the best scale for its codes."""
    levels_L = normal_floats.levels(bits)
    between = (levels_L[:-1] + levels_L[1:]) / 2
    largest = np.abs(blocks).max(axis=1)
    found = errors(blocks, largest, bits)
    for share in np.linspace(0.2, 1, 400):
        chosen = levels_L[np.searchsorted(between, blocks / (share * largest)[:, None])]
        scales = (blocks * chosen).sum(axis=1) / np.maximum((chosen**2).sum(axis=1), 1e-300)
        found = np.minimum(found, errors(blocks, scales, bits))
    return found


@pytest.mark.parametrize(("block", "power"), [(16, 3.0), (64, 1.0), (128, 3.0)])  # 3: heavy tails
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_error_is_nearly_the_least_and_never_above_that_of_the_largest_magnitude(bits, block, power):
    noise = torch.randn(200, block, generator=torch.Generator().manual_seed(bits))
    blocks = noise.sign() * noise.abs() ** power
    largest = blocks.abs().amax(dim=1)
    exact = blocks.double().numpy()
    found = errors(exact, fitted(blocks, largest, NormalFloat(bits=bits)).double().numpy(), bits)
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
