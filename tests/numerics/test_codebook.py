"""The levels of NormalFloat against SciPy's quantiles, and the nearest of them by brute force."""

import bitsandbytes.functional as bitsandbytes
import numpy as np
import pytest
import scipy.stats
import torch

from qsvd.numerics import codebook
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
