"""Before and after against float64 NumPy, and bits counted by hand."""

import numpy as np
import pytest
import torch

from qsvd.decompose.alternate import Recipe, split_weight
from qsvd.decompose.split import measure
from qsvd.numerics import norms
from qsvd.numerics.nf4 import NormalFloat4
from tests import reference

ROUNDOFF = 40 * 2.0**-24  # of ||W||_F: the error matrices are float32 differences of entries as large as the weight's


def measured(weight, recipe, seed=0):
    return measure(weight, split_weight(weight, recipe), name="layers.0.q_proj", role="q", seed=seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [0, 6])
@pytest.mark.parametrize("shape", [(60, 96), (96, 60)])
def test_before_is_the_codec_alone_and_after_is_the_stored_split(shape, rank, dtype):
    weight = torch.from_numpy(reference.decaying(*shape, power=0.5)).to(dtype)
    exact = weight.double().numpy()
    split = split_weight(weight, Recipe(NormalFloat4(double_quant=False), rank, 2))
    found = measure(weight, split, name="layers.0.q_proj", role="q")
    low_rank = split.up_OR.double().numpy() @ split.down_RI.double().numpy()
    residual = reference.nf4_decode(
        reference.unpacked(split.residual.codes.numpy(), exact.size), split.residual.scales.numpy(), shape
    )
    errors = (exact - reference.nf4_round_trip(exact, double_quant=False), exact - residual - low_rank)
    norm = float(np.linalg.norm(exact))
    for stated, matrix in zip((found.before, found.after), errors, strict=True):
        values = reference.singular_values(matrix)
        assert stated.frobenius == pytest.approx(float(np.linalg.norm(values)), abs=ROUNDOFF * norm)
        assert stated.nuclear == pytest.approx(float(values.sum()), abs=ROUNDOFF * norm * len(values) ** 0.5)
        assert stated.spectral == pytest.approx(float(values[0]), abs=ROUNDOFF * norm)
        assert stated.nuclear_error == 0
    assert found.weight_frobenius == pytest.approx(norm, rel=ROUNDOFF)
    assert (found.name, found.role, found.shape, found.rank) == ("layers.0.q_proj", "q", shape, rank)
    assert (found.before == found.after) == (rank == 0)


def test_before_is_double_quantized_where_the_split_is():
    weight = torch.from_numpy(reference.decaying(300, 65, power=0.5))
    plain, double = (measured(weight, Recipe(NormalFloat4(double_quant=double), 0)) for double in (False, True))
    by_definition = reference.nf4_round_trip(weight.numpy(), double_quant=True)
    assert double.before.frobenius != plain.before.frobenius
    assert double.before.frobenius == pytest.approx(float(np.linalg.norm(weight.numpy() - by_definition)), rel=1e-3)


@pytest.mark.parametrize(
    ("double_quant", "rank", "dtype", "num_bytes"),
    [
        (False, 0, torch.bfloat16, 4096 + 128 * 4),
        (True, 0, torch.bfloat16, 4096 + 128 + 4 + 4),
        (False, 4, torch.bfloat16, 4096 + 128 * 4 + (64 + 128) * 4 * 2),
        (True, 4, torch.bfloat16, 4096 + 128 + 4 + 4 + (64 + 128) * 4 * 2),
        (True, 4, torch.float32, 4096 + 128 + 4 + 4 + (64 + 128) * 4 * 4),
    ],
)
def test_bits_count_codes_scales_and_factors(double_quant, rank, dtype, num_bytes):
    """64 x 128 weights: 8192 codes of half a byte, 128 blocks."""
    weight = torch.from_numpy(reference.gaussian(64, 128))
    recipe = Recipe(NormalFloat4(double_quant=double_quant), rank, 1, dtype=dtype)
    assert split_weight(weight, recipe).num_bytes == num_bytes
    assert measured(weight, recipe).bits == 8 * num_bytes / 8192


def test_the_iteration_is_that_of_the_split():
    weight = torch.from_numpy(reference.decaying(60, 96, power=0.5))
    split = split_weight(weight, Recipe(NormalFloat4(double_quant=False), 6, 5))
    assert split.iteration > 1
    assert measure(weight, split, name="", role="").iteration == split.iteration


def test_the_seed_decides_the_probes_and_nothing_else(monkeypatch):
    monkeypatch.setattr(norms, "EXACT_SIDE", 32)
    weight, recipe = torch.from_numpy(reference.gaussian(60, 96)), Recipe(NormalFloat4(double_quant=False), 3, 1)
    found = [measured(weight, recipe, seed) for seed in (1, 1, 2)]
    assert found[0] == found[1]
    assert found[0].before.nuclear != found[2].before.nuclear
    assert found[0].after.nuclear != found[2].after.nuclear
    assert found[0].after.frobenius == found[2].after.frobenius


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measuring_leaves_weight_and_split_as_they_were(dtype):
    weight = torch.from_numpy(reference.gaussian(60, 96)).to(dtype)
    split = split_weight(weight, Recipe(NormalFloat4(double_quant=True), 3, 1))
    before, residual = weight.clone(), split.residual.decode()
    first = measure(weight, split, name="", role="")
    assert torch.equal(weight, before)
    assert torch.equal(split.residual.decode(), residual)
    assert measure(weight, split, name="", role="") == first
