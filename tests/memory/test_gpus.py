"""Training on several GPUs: bytes and seconds of each strategy, against sums done here from the shapes."""

from dataclasses import replace

import pytest

from qsvd.memory.duration import Rate, Speed
from qsvd.memory.gpus.strategies import Group, best_of, strategies
from qsvd.memory.items import Limits
from qsvd.memory.placement import Wish, place
from tests.memory.large import GB, llama_70b, training

SHAPES = [(8192, 8192)] * 2 + [(1024, 8192)] * 2 + [(28672, 8192)] * 2 + [(8192, 28672)]  # of one of 80 blocks
NUMBERS = sum(rows * columns for rows, columns in SHAPES)
BLOCKS, RANK = 80, 64
SPEED = Speed(Rate(2e14), Rate(20e9), Rate(3e9))


def packed():
    """Bytes of one block in NF4 with nested scales: half a byte a number, an absmax byte in 64, a float32 in 16384.

    Each matrix has the 256 values of the nested scales' code and the 16 of NF4 too, and one float32 mean.
    """
    return sum(rows * columns * (1 / 2 + 1 / 64 + 4 / 16384) + 4 * (256 + 16 + 1) for rows, columns in SHAPES)


def found(gpus, gpu, host=128, *, batches=8, interconnect=100e9, wish=Wish(), **changes):  # noqa: B008  # frozen
    run = training(2048, accumulate=batches // gpus, **changes)
    limits = Limits(gpu * GB, host * GB)
    return {
        one.way: one for one in strategies(llama_70b(RANK), run, limits, wish, Group(gpus, SPEED, Rate(interconnect)))
    }


def gpu_bytes(strategy, *names):
    return sum(strategy.placed.memory[name].gpu for name in names)


def test_a_sharded_residual_takes_its_part_and_three_whole_blocks():
    one = found(4, 80)["sharded"]
    residual = gpu_bytes(one, "residual codes", "residual scales")
    assert residual == pytest.approx(BLOCKS * packed() / 4, rel=1e-4)
    assert gpu_bytes(one, "page slots") == pytest.approx(3 * packed(), rel=1e-4)
    whole = found(4, 80)["whole"]
    assert gpu_bytes(whole, "residual codes", "residual scales") == pytest.approx(BLOCKS * packed(), rel=1e-4)
    for name in ("trained parameters", "optimizer state", "gradients", "embeddings", "output head"):
        assert gpu_bytes(one, name) == gpu_bytes(whole, name) > 0, "these are whole in every process"
    rest = sum(item.gpu for item in one.placed.memory.items if item.name != "reserve")
    assert one.placed.memory["reserve"].gpu == pytest.approx(0.04 * rest)


def test_a_part_in_cpu_memory_takes_a_power_of_two_and_is_copied_once_for_each_pass():
    one = found(2, 24)["sharded, offloaded"]
    assert gpu_bytes(one, "residual codes", "residual scales") == 0
    part = packed() / 2
    assert 2**27 < part < 2**28
    assert one.placed.memory["pages"].host == BLOCKS * 2**28
    assert one.step.one.transfer == pytest.approx(2 * 4 * BLOCKS * part / 20e9, rel=1e-4)
    assert one.step.gather == pytest.approx(2 * 4 * BLOCKS * part / 100e9, rel=1e-4), "half of each block"


def test_gathering_is_hidden_behind_computing_where_it_is_shorter():
    """8 batches over 4 GPUs: each gathers 3/4 of the residual for 2 batches, forward and backward."""
    fast, slow = (found(4, 80, interconnect=rate)["sharded"].step for rate in (100e9, 1e9))
    assert fast.gather == pytest.approx(2 * 2 * BLOCKS * packed() * 3 / 4 / 100e9, rel=1e-4)
    assert slow.gather == pytest.approx(100 * fast.gather)
    assert fast.seconds == fast.one.compute + fast.one.decode + fast.reduce
    assert slow.seconds == slow.gather + slow.reduce
    assert fast.one.compute + fast.one.decode < slow.gather
    assert fast.tokens_per_second == pytest.approx(8 * 2048 / fast.seconds)
    assert "sharded" not in found(4, 80, layer_major=True), "qsvd train refuses it"


def test_the_sum_of_the_gradients_moves_them_nearly_twice():
    """Each GPU sends (N - 1) / N of them to be added up, and gets as much back; rank 64 in bfloat16."""
    adapters = 2 * BLOCKS * RANK * sum(rows + columns for rows, columns in SHAPES)
    for strategy in found(4, 80).values():
        assert strategy.step.reduce == pytest.approx(2 * 3 / 4 * adapters / 100e9)


def test_whole_models_scale_with_the_gpus_but_for_the_gradients():
    """The same 8 sequences: 4 GPUs compute 2 each."""
    one = place(llama_70b(RANK), training(2048, accumulate=8), Limits(80 * GB, 128 * GB), Wish(1.0))
    assert one.memory.fits
    step = found(4, 80)["whole"].step
    numbers = BLOCKS * NUMBERS + 8192 * 128256
    assert step.one.compute == pytest.approx(3 * 2 * numbers * 2 * 2048 / 2e14)
    assert step.one.tokens == 2 * 2048
    assert step.gather == step.one.transfer == 0


def test_processes_divide_the_cpu_memory():
    strategy = found(2, 24)["offloaded"]
    assert strategy.fits
    assert strategy.placed.memory.limits.host == 64 * GB
    left = BLOCKS - strategy.placed.placement.resident
    assert strategy.host == 2 * strategy.placed.memory.total("host") > 2 * left * packed()
    assert strategy.step.one.transfer == pytest.approx(2 * 4 * left * packed() / 20e9, rel=1e-4)
    disk = found(8, 24)["offloaded"]
    assert disk.placed.placement.pages == "disk", "16 GB each are too few"
    left = BLOCKS - disk.placed.placement.resident
    assert disk.step.one.transfer == pytest.approx(2 * 1 * left * packed() / (3e9 / 8), rel=1e-4), "eight share it"


def test_sharded_residuals_make_room_as_a_single_gpu_does():
    """Embeddings leave the GPU first, then activation checkpoints."""
    ways = [found(8, gpu)["sharded"].placed for gpu in (19, 17, 16)]
    assert [(one.placement.embeddings_on_host, one.placement.activation_offload) for one in ways] == [
        (False, False),
        (True, False),
        (True, True),
    ]
    assert all(one.memory.fits for one in ways)
    assert not found(8, 8)["sharded"].fits


def test_the_best_is_the_fastest_that_fits_and_of_equal_ones_the_simplest():
    large = found(4, 80)
    assert set(large) == {"whole", "sharded"}, "nothing is offloaded where all fits"
    assert best_of(tuple(large.values())).way == "whole"
    middle = found(4, 40)
    assert [way for way, one in middle.items() if one.fits] == ["sharded", "offloaded"]
    assert best_of(tuple(middle.values())).way == "sharded"
    slow = found(4, 40, interconnect=1e9)
    assert best_of(tuple(slow.values())).way == "offloaded"
    assert best_of(tuple(one for one in found(2, 4).values())) is None


def test_sharding_keeps_activations_in_the_memory_that_it_frees():
    auto = replace(Wish(), unrecomputed="auto")
    kept = {gpus: found(gpus, 48, wish=auto)["sharded"] for gpus in (2, 8)}
    assert 0 < kept[2].placed.placement.unrecomputed < kept[8].placed.placement.unrecomputed
    assert all(one.placed.memory.total("gpu") <= 0.9 * 48 * GB for one in kept.values())
