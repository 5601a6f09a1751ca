"""Which blocks keep their activations: the shortest step of all placements that fit, by trying every one."""

import math
from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch
from transformers import LlamaConfig

from qsvd.adapters.adapter import AdapterOptions
from qsvd.adapters.start import planned
from qsvd.memory.duration import GPU, step_time
from qsvd.memory.items import Limits, Placement
from qsvd.memory.placement import GAIN, GPU_SHARE, HOST_SHARE, Wish, place
from qsvd.memory.split_model import skeleton
from qsvd.memory.training import plan_training
from qsvd.numerics.nf4 import NormalFloat4
from qsvd.plan.allocation import Choice, uniform
from qsvd.plan.weights import plan_model
from tests.memory.large import CONFIG, GB, training

BLOCKS = 6
AUTO = Wish(unrecomputed="auto")


@cache
def model(method=None):
    """Six blocks of Llama-3-70B: 0.44 GB of quantized weights each."""
    config = LlamaConfig(**CONFIG | {"num_hidden_layers": BLOCKS})
    names = plan_model(config)
    same = uniform(names.weights, Choice(NormalFloat4(double_quant=True), 16))
    return planned(names=names, empty=skeleton(config, torch.bfloat16), allocation=same, options=AdapterOptions(method))


def every_fitting(run, limits):
    """The seconds of every placement that leaves enough free, the embeddings on the GPU or not."""
    found = {}
    for resident, kept, on_host in product(range(BLOCKS + 1), range(BLOCKS + 1), (False, True)):
        if resident == BLOCKS or on_host:
            one = Placement(resident, "host", embeddings_on_host=on_host, unrecomputed=kept)
            if plan_training(model(), run, one, limits).fits:
                found[one] = step_time(model(), run, one, GPU).seconds
    return found


@pytest.mark.parametrize("tokens", [64, 512, 4096])
@pytest.mark.parametrize("gpu", [8, 10, 14, 20, 80])
def test_the_chosen_placement_has_the_shortest_step(gpu, tokens):
    run, limits = training(tokens), Limits(gpu * GB, 64 * GB)
    found = place(model(), run, limits, AUTO)
    least = place(model(), run, limits).placement
    if not found.memory.fits:
        assert found.placement == least
        return
    host = 1.0 if least.resident < BLOCKS else HOST_SHARE
    possible = every_fitting(run, Limits(int(GPU_SHARE * gpu * GB), int(host * 64 * GB)))
    possible[least] = step_time(model(), run, least, GPU).seconds
    with_as_many = (replace(least, unrecomputed=number) for number in range(BLOCKS + 1))
    still, best = min(possible[one] for one in with_as_many if one in possible), min(possible.values())
    assert found.memory.fits
    assert step_time(model(), run, found.placement, GPU).seconds == (best if best <= GAIN * still else still)


def test_bases_of_full_rank_take_as_long_as_weights_of_their_size():
    run, all_stay = training(4096), Placement(BLOCKS)
    plain, with_bases = (step_time(model(method), run, all_stay, GPU).compute for method in (None, "randlora"))
    more = sum(math.ceil(min(spec.shape) / 32) * 32 * sum(spec.shape) for spec in model().names.weights)
    assert with_bases - plain == pytest.approx(2 * 3 * more * 4096 / GPU.flops.value)


def test_a_large_card_keeps_all_and_short_sequences_keep_the_blocks_on_the_gpu():
    assert place(model(), training(4096), Limits(80 * GB, 64 * GB), AUTO).placement == Placement(6, unrecomputed=6)
    short, long = (place(model(), training(n), Limits(12 * GB, 64 * GB), AUTO).placement for n in (64, 4096))
    assert short.resident == BLOCKS
    assert long.resident < BLOCKS
    assert long.unrecomputed > 0


def test_all_are_recomputed_where_nothing_else_can_be_or_no_limit_is_known():
    limits = Limits(80 * GB, 64 * GB)
    for run, wish, known in (
        (training(4096), AUTO, Limits()),
        (training(4096), replace(AUTO, offload="yes"), limits),
        (training(4096, accumulate=2, layer_major=True), AUTO, limits),
        (training(4096), Wish(), limits),
    ):
        assert place(model(), run, known, wish).placement.unrecomputed == 0


def test_a_wished_number_is_kept_and_costs_resident_blocks():
    run, limits = training(4096), Limits(12 * GB, 64 * GB)
    numbers = [place(model(), run, limits, Wish(unrecomputed=n)).placement for n in range(5)]
    assert [one.unrecomputed for one in numbers] == [0, 1, 2, 3, 4]
    assert numbers[4].resident < numbers[0].resident
    assert not any(one.activation_offload for one in numbers)


def test_a_cpu_is_not_filled():
    run = replace(training(512), batch=replace(training(512).batch, device="cpu"))
    least, most = (
        plan_training(model(), run, Placement(6, "disk", unrecomputed=n), Limits()).total("host") for n in (0, 6)
    )
    assert place(model(), run, Limits(host=2 * most), AUTO).placement.unrecomputed == 6
    assert place(model(), run, Limits(host=2 * most - 2), AUTO).placement.unrecomputed == 5
    assert place(model(), run, Limits(host=least), AUTO).placement == Placement(6, "disk")
