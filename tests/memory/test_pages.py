"""Which blocks are offloaded, and how their bytes lie in pages."""

from itertools import pairwise

import pytest

from qsvd.memory.items import ALIGNMENT, block_of, num_resident, num_slots, padded, page_bytes, resident_blocks


@pytest.mark.parametrize(
    ("module", "block"),
    [
        ("model.layers.3.self_attn.q_proj", "model.layers.3"),
        ("model.layers.31.mlp.experts.7.w1", "model.layers.31"),
        ("encoder.block.0.layer.1.DenseReluDense.wi", "encoder.block.0"),
        ("bert.pooler.dense", "bert.pooler.dense"),
        ("h2o.h.5.attn", "h2o.h.5"),
    ],
)
def test_a_block_is_named_up_to_its_first_number(module, block):
    assert block_of(module) == block


def test_tensors_of_a_page_begin_at_multiples():
    assert [padded(size) for size in (0, 1, ALIGNMENT, ALIGNMENT + 1)] == [0, ALIGNMENT, ALIGNMENT, 2 * ALIGNMENT]
    assert page_bytes(iter([1, ALIGNMENT, ALIGNMENT + 1])) == 4 * ALIGNMENT
    assert ALIGNMENT % 128 == 0  # what a GPU reads at a time


@pytest.mark.parametrize("blocks", [1, 2, 7, 32, 80])
def test_as_many_are_resident_as_were_asked_for_and_the_others_lie_between_them(blocks):
    for resident in range(blocks + 1):
        stay = sorted(resident_blocks(blocks, resident))
        assert len(set(stay)) == len(stay) == resident
        assert set(stay) <= set(range(blocks))
        between = [after - before for before, after in pairwise([*stay, *(n + blocks for n in stay[:1])])]
        assert not between or max(between) - min(between) <= 1


@pytest.mark.parametrize("blocks", [1, 7, 80, 100, 126])
def test_a_share_of_so_many_blocks_keeps_so_many(blocks):
    for resident in range(blocks + 1):
        assert num_resident(resident / blocks, blocks) == resident  # 0.29 * 100 is 28.999999999999996
    assert num_resident(0.999, blocks) == blocks - 1
    assert num_resident(0.001, blocks) == 0


def test_there_are_three_places_or_one_for_each_page():
    assert [num_slots(paged) for paged in (0, 1, 2, 3, 4, 80)] == [0, 1, 2, 3, 3, 3]
