"""Drawn tensors look like trained ones; judged by NumPy and SciPy, and by what real NF4 matrices hold."""

import numpy as np
import pytest
import random_weights
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from qsvd.numerics.nf4 import NormalFloat4

CPU = torch.device("cpu")
SHAPE = (512, 768)


def drawn(name="weight", *, seed=0, shape=SHAPE, dtype=torch.float32):
    return random_weights.draw_weight(shape, random_weights.generator_of(seed, name, CPU), dtype)


@pytest.fixture(scope="module")
def weight():
    return drawn().double().numpy()


def outliers_of(weight):
    sizes = np.linalg.norm(weight, axis=0)
    return np.flatnonzero(sizes > 3 * np.median(sizes))


def test_a_few_columns_are_several_times_as_large_as_the_others(weight):
    assert len(outliers_of(weight)) == 6


def test_the_entries_of_the_other_columns_have_heavy_tails(weight):
    kurtosis = scipy.stats.kurtosis(np.delete(weight, outliers_of(weight), axis=1), axis=None)
    assert 0.5 < kurtosis < 2  # Student's t of 8 degrees of freedom has 1.5, a Gaussian 0


def test_the_largest_singular_values_fall_as_a_power_law_over_noise(weight):
    ordinary = np.delete(weight, outliers_of(weight), axis=1)
    values = np.linalg.svd(ordinary, compute_uv=False)
    noise = np.linalg.svd(np.random.default_rng(0).standard_normal(ordinary.shape), compute_uv=False)
    edge = noise[0] * np.median(np.abs(ordinary)) / 0.6745
    assert 3 < values[0] / edge < 6
    slope = scipy.stats.linregress(np.log(np.arange(1, 17)), np.log(values[:16])).slope
    assert slope == pytest.approx(-random_weights.POWER, abs=0.15)
    assert values[300] < edge
    shares = [np.sum(s[:16] ** 2) / np.sum(s**2) for s in (values, noise)]
    assert shares[0] > 2.5 * shares[1]


def test_a_draw_depends_on_seed_and_name_alone(weight):
    drawn("another one first")
    assert drawn().numpy().tobytes() == weight.astype(np.float32).tobytes()
    assert not torch.equal(drawn(seed=1), drawn())
    assert not torch.equal(drawn("other"), drawn())


def test_a_16_bit_weight_is_the_float32_one_rounded():
    assert torch.equal(drawn(dtype=torch.bfloat16), drawn().bfloat16())


@given(rows=st.integers(1, 70), columns=st.integers(1, 70))
def test_a_weight_of_any_shape_can_be_drawn(rows, columns):
    found = drawn(shape=(rows, columns))
    assert found.shape == (rows, columns)
    assert torch.isfinite(found).all()


def test_runs_shorter_than_the_weight_draw_all_of_it(monkeypatch):
    monkeypatch.setattr(random_weights, "RUN_CPU", 1 << 12)
    found = drawn().double().numpy()
    assert np.all(np.std(found, axis=1) > 0.01)
    assert np.abs(np.corrcoef(found[:64])[0, 1:]).max() < 0.9


def test_an_embedding_is_gaussian():
    generator = random_weights.generator_of(0, "embedding", CPU)
    values = random_weights.draw_gaussian((100, 64), generator, torch.float32).double().numpy()
    assert values.shape == (100, 64)
    assert scipy.stats.kstest(values.ravel() / random_weights.STD, "norm").pvalue > 0.01


def test_codes_are_as_frequent_as_in_the_nf4_of_gaussian_noise():
    codes = random_weights.draw_codes((512, 513), random_weights.generator_of(0, "codes", CPU)).numpy()
    assert codes.shape == (512 * 513 // 2,)
    noise = torch.from_numpy(np.random.default_rng(7).standard_normal((512, 512)).astype(np.float32))
    real = NormalFloat4(double_quant=False).encode(noise).codes.numpy()
    counts = [np.bincount(np.concatenate((c >> 4, c & 15)), minlength=16) / (2 * c.size) for c in (codes, real)]
    deviation = np.sqrt(counts[1] * (1 / (2 * codes.size) + 1 / (2 * real.size) + 1 / (1 << 17)))  # and of the table
    assert np.all(np.abs(counts[0] - counts[1]) < 5 * deviation)


def test_scales_are_maxima_of_blocks_of_gaussian_noise():
    generator = random_weights.generator_of(0, "scales", CPU)
    scales = random_weights.draw_scales((512, 512), NormalFloat4(double_quant=False), generator)
    assert scales.shape == (4096,)
    of_blocks = lambda x: scipy.stats.halfnorm.cdf(x) ** 64  # noqa: E731
    assert scipy.stats.kstest(scales.double().numpy() / random_weights.STD, of_blocks).pvalue > 0.01


def test_doubly_quantized_scales_are_the_plain_ones_within_8_bits():
    plain, nested = (
        random_weights.draw_scales((512, 512), codec, random_weights.generator_of(0, "scales", CPU))
        for codec in (NormalFloat4(double_quant=False), NormalFloat4(double_quant=True))
    )
    assert torch.allclose(nested.decode(), plain, rtol=0.05)


@pytest.mark.parametrize("rank", [0, 1, 16])
def test_factors_fall_as_a_power_law_and_share_it_evenly(rank):
    generator = random_weights.generator_of(0, "factors", CPU)
    up, down = (f.double().numpy() for f in random_weights.draw_factors((2048, 3072), rank, generator))
    assert (up.shape, down.shape) == ((2048, rank), (rank, 3072))
    sizes = np.linalg.norm(up, axis=0) * np.linalg.norm(down, axis=1)
    assert sizes == pytest.approx(sizes[:1] * np.arange(1, rank + 1) ** -random_weights.POWER, rel=0.1)
    assert np.linalg.norm(up, axis=0) == pytest.approx(np.linalg.norm(down, axis=1), rel=0.1)
