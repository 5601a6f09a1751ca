"""As many blocks are resident as fit, and everything else goes where it is told to."""

from dataclasses import replace

import pytest

from qsvd.memory.items import Limits, Placement, page_bytes
from qsvd.memory.placement import Wish, can_fit, place, place_serving
from qsvd.memory.training import plan_training
from qsvd.numerics.nf4 import NormalFloat4
from tests.memory.large import GB, llama_70b, training


def placed(gpu, host=64, rank=64, tokens=4096, wish=Wish(), **changes):  # noqa: B008  # frozen
    return place(llama_70b(rank), training(tokens, **changes), Limits(gpu * GB, host * GB), wish)


def test_everything_is_on_the_gpu_if_it_fits():
    assert placed(80).placement == Placement(80)
    assert placed(80).memory.fits


@pytest.mark.parametrize(("gpu", "rank", "tokens"), [(24, 64, 4096), (12, 16, 2048), (48, 64, 4096), (24, 16, 512)])
def test_one_block_more_would_not_fit(gpu, rank, tokens):
    found = placed(gpu, rank=rank, tokens=tokens)
    assert found.memory.fits
    assert found.placement.embeddings_on_host
    assert 0 < found.placement.resident < 80
    limits = found.memory.limits
    more = replace(found.placement, resident=found.placement.resident + 1)
    assert not plan_training(llama_70b(rank), training(tokens), more, limits).fits
    assert can_fit(llama_70b(rank), training(tokens), limits)


def test_checkpoints_go_to_the_host_last():
    here, there = placed(24), placed(16, tokens=8192)
    assert not here.placement.activation_offload
    assert there.memory.fits
    assert there.placement.activation_offload
    assert there.memory["checkpoints of activations"].host > 0


def test_pages_are_on_disk_where_the_host_is_too_small():
    found = placed(24, host=16)
    assert found.memory.fits
    assert found.placement.pages == "disk"
    assert found.memory["pages"].host == 3 * llama_70b(64).blocks[0].page, "a ring of the slots alone"


def test_cpu_memory_holds_the_pages_of_the_offloaded_blocks():
    found = placed(24)
    offloaded = 80 - found.placement.resident
    shapes = [(8192, 8192)] * 2 + [(1024, 8192)] * 2 + [(28672, 8192)] * 2 + [(8192, 28672)]
    page = page_bytes(size for shape in shapes for size in NormalFloat4(double_quant=True).parts(shape).values())
    assert found.memory["pages"].host == offloaded * page
    assert found.memory["page slots"].gpu == 3 * page


def test_the_share_that_is_wished_is_kept():
    assert placed(80, wish=Wish(0.5)).placement.resident == 40
    assert not placed(24, wish=Wish(1.0)).memory.fits
    assert placed(24, wish=Wish(0.0)).placement.resident == 0
    assert placed(80, wish=Wish(offload="yes")).placement.activation_offload
    assert not placed(16, rank=16, tokens=8192, wish=Wish(offload="no")).placement.activation_offload


def test_what_does_not_fit_says_how_much_lacks():
    found = placed(12, rank=128)
    assert not found.memory.fits
    assert found.memory.lacking == ("gpu",)
    assert found.memory.spare("gpu") == 12 * GB - found.memory.total("gpu") < 0
    assert found.memory.spare("disk") is None
    assert not can_fit(llama_70b(128), training(), Limits(12 * GB, 64 * GB))


def test_layer_major_keeps_the_checkpoints_of_every_batch():
    model, limits = llama_70b(16), Limits()
    minor, major = (
        plan_training(model, training(1024, accumulate=4, layer_major=major), Placement(0), limits)[
            "checkpoints of activations"
        ].gpu
        for major in (False, True)
    )
    assert major == pytest.approx(4 * minor, rel=0.05)  # and gradients of all hidden states for a few


def test_serving_places_blocks_too():
    batch = training(4096).batch
    found = place_serving(llama_70b(64), batch, Limits(24 * GB, 64 * GB))
    assert found.memory.fits
    assert 0 < found.placement.resident < 80
    assert (
        found.memory["keys and values"].gpu == 2 * 80 * 8 * 128 * 2 * 4096
    )  # both, blocks, heads, width, bytes, tokens
