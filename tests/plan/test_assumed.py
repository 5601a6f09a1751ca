"""What a budget looks like before a weight is read: its bytes, and the codecs that Gaussian noise would want."""

import math

import pytest

from qsvd.plan.allocation import residual_bits, stored_bytes
from qsvd.plan.budget import assumed, most_rank_within, noise_square
from qsvd.plan.weights import WeightSpec, plan_model
from tests import normal_floats
from tests.checkpoints import tiny_config

WEIGHTS = plan_model(tiny_config("LlamaForCausalLM", hidden_size=256, intermediate_size=512)).weights
ELEMENTS = sum(math.prod(spec.shape) for spec in WEIGHTS)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("bits", [2.5, 2.75, 3.25, 4.5])
def test_a_budget_is_met_and_nearly_used(bits, rank):
    found = assumed(WEIGHTS, f"{bits}bits", rank)
    used = 8 * stored_bytes(found, WEIGHTS) / ELEMENTS
    assert bits - 0.1 < used <= bits
    assert {choice.rank for choice in found.choices.values()} == {rank}
    factors = sum(16 * rank * sum(spec.shape) for spec in WEIGHTS) / ELEMENTS
    assert residual_bits(found, WEIGHTS) == pytest.approx(used - factors)


@pytest.mark.parametrize("bits", [2.5, 2.75, 3.25])
def test_the_highest_rank_is_the_last_that_fits(bits):
    rank = most_rank_within(WEIGHTS, f"{bits}bits")
    assert 8 * stored_bytes(assumed(WEIGHTS, f"{bits}bits", rank), WEIGHTS) / ELEMENTS <= bits
    with pytest.raises(ValueError, match=r"below the \d+ bytes of the smallest candidates"):
        assumed(WEIGHTS, f"{bits}bits", rank + 1)


def test_ranks_end_at_the_shorter_side():
    weights = [WeightSpec(name, name, (rows, 256), "other", 0) for name, rows in (("a", 8), ("b", 256))]
    assert [choice.rank for choice in assumed(weights, "8bits", 12).choices.values()] == [8, 12]
    assert most_rank_within(weights, "16bits") == 8


def test_too_small_a_budget_is_refused_with_one_that_would_do():
    with pytest.raises(ValueError, match=r"--budget 2bits is too small: the 14 weights need (2\.\d\d\d)bits") as error:
        most_rank_within(WEIGHTS, "2bits")
    least = str(error.value).split("need ")[1]
    assert most_rank_within(WEIGHTS, least) == 0


@pytest.mark.parametrize(("codec", "bits", "block"), [("nf2-64-fp32", 2, 64), ("nf3-16-fp32", 3, 16)])
def test_the_error_of_noise_is_the_expected_one(codec, bits, block):
    assert noise_square(codec) == pytest.approx(normal_floats.gaussian_error(bits, block) ** 2, rel=0.02)
