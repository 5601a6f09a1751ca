"""Llama-3-70B against numbers that were published or worked out by hand (shared/design/peers.md, section 3)."""

import pytest

from qsvd.memory.duration import Rate, Speed, quantize_time, step_time
from qsvd.memory.items import EVERYTHING, Limits, Placement
from qsvd.memory.training import plan_training
from tests.memory.large import GB, llama_70b, training

LINEARS = 68.45e9  # numbers in the linear layers of the blocks


@pytest.mark.parametrize(("double_quant", "gigabytes"), [(True, 35.3), (False, 38.5)])
def test_the_residual_has_its_size(double_quant, gigabytes):
    model = llama_70b(64, double_quant=double_quant)
    assert model.elements == pytest.approx(LINEARS, rel=1e-3)
    assert sum(block.residual for block in model.blocks) == pytest.approx(gigabytes * GB, rel=2e-3)
    assert model.blocks[0].residual == pytest.approx(gigabytes / 80 * GB, rel=2e-3)


def test_embeddings_head_and_adapters_have_their_sizes():
    model = llama_70b(64)
    assert model.dense.embeddings + model.dense.head == 2 * 2 * 128256 * 8192
    assert model.dense.rest == 2 * 8192 * (2 * 80 + 1) + 2 * 4 * 64  # norms, and the rotation's frequencies twice
    assert sum(tensor.numel for tensor in model.parameters) == pytest.approx(12.94e6 * 64, rel=1e-3)


def test_bf16_adapters_with_8_bit_adam_take_6_bytes_a_parameter():
    plan = plan_training(llama_70b(64), training(accumulate=2), EVERYTHING, Limits())
    own = sum(plan[name].gpu for name in ("trained parameters", "gradients", "optimizer state"))
    assert own == pytest.approx(5.0 * GB, rel=0.01)


def test_three_checkpoints_of_the_run_may_be_on_disk_at_once():
    plan = plan_training(llama_70b(64), training(accumulate=2), EVERYTHING, Limits())
    assert plan["checkpoints of the run"].disk == 3 * (plan["trained parameters"].gpu + plan["optimizer state"].gpu)


def test_splitting_takes_the_time_of_its_products():
    speed = Speed(Rate(1e14), Rate(25e9), Rate(3e9))
    of_norms = 2 * llama_70b(0).elements * 2 * 2 * 16 * 16  # before and after, twice a step: 16 steps, 16 probes
    memory = 60 * 5 * llama_70b(0).elements / 1e12
    plain = quantize_time(llama_70b(0), 5, speed)
    assert plain.compute == pytest.approx(of_norms / (0.25 * 1e14) + memory)
    assert plain.read == pytest.approx(141.1 / 3, rel=0.01)  # GB of the checkpoint
    assert plain.write == pytest.approx(2 * 39.5 / 3, rel=0.01)
    assert plain.seconds == plain.read + plain.write
    passes = 2 * llama_70b(64).elements * (2 * (5 + 5) * 96 + 2 * 5 * 64)  # 64 and half of it columns
    assert quantize_time(llama_70b(64), 5, speed).compute == pytest.approx((of_norms + passes) / (0.25 * 1e14) + memory)


def test_checkpoints_take_16_kilobytes_a_token_and_block():
    plan = plan_training(llama_70b(16), training(2048, accumulate=2), EVERYTHING, Limits())
    assert plan["checkpoints of activations"].gpu == pytest.approx(1.31e6 * 2048, rel=0.01)


def test_every_page_moves_twice_a_batch_and_hides_behind_633_tokens():
    speed = Speed(Rate(95e12), Rate(25e9), Rate(3e9))
    step = step_time(llama_70b(64), training(633), Placement(0), speed)
    assert step.transfer == pytest.approx(2.8, rel=0.02)
    assert step.compute == pytest.approx(step.transfer, rel=0.03)  # the head is counted here, not there
    major = step_time(llama_70b(64), training(633, accumulate=8, layer_major=True), Placement(0), speed)
    minor = step_time(llama_70b(64), training(633, accumulate=8), Placement(0), speed)
    assert major.transfer == pytest.approx(step.transfer)
    assert minor.transfer == pytest.approx(8 * step.transfer)
    assert minor.tokens == 8 * 633
    from_disk = step_time(llama_70b(64), training(633), Placement(0, "disk"), speed)
    assert from_disk.transfer == pytest.approx(step.transfer * 25 / 3)
