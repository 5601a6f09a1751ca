"""Which candidates there are, and what each takes of a budget."""

import itertools
import math

import pytest

from qsvd.numerics.names import codec_named
from qsvd.plan.allocation import Choice
from qsvd.plan.grid import FACTOR_BITS, MOST_RANKS, counted_bytes, grid_of, ladder
from tests.plan.weights import specs

WEIGHTS = specs()


@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (16, 32), (384, 384), (384, 1536), (8192, 28672), (1024, 8192)])
def test_the_ladder_is_0_and_the_highest_powers_of_two_whose_factors_are_not_too_large(shape):
    ranks = ladder(shape)
    assert ranks[0] == 0
    powers = ranks[1:]
    assert len(ranks) <= MOST_RANKS
    bits = [16 * rank * sum(shape) / math.prod(shape) for rank in powers]
    assert all(math.log2(rank).is_integer() for rank in powers)
    assert all(later == 2 * earlier for earlier, later in itertools.pairwise(powers))
    assert all(one <= FACTOR_BITS for one in bits)
    if powers:
        assert 2 * bits[-1] > FACTOR_BITS
        assert powers[0] == 1 or len(ranks) == MOST_RANKS
        assert powers[-1] <= min(shape) / 2
    else:
        assert 16 * sum(shape) / math.prod(shape) > FACTOR_BITS


def test_there_are_30_to_60_candidates_for_a_large_weight():
    grid, shape = grid_of((), (), 0, WEIGHTS), (4096, 4096)
    found = grid.choices(grid.offered(shape))
    assert 30 <= len(found) == len({*found}) <= 60
    ranks = [choice.rank for choice in found if choice.codec.name == "nf4-32-4x64-fit"]
    assert ranks == [0], "smaller blocks are the control of components, at equal bytes"
    given = grid_of(("nf4-32-4x64-fit",), (), 0, WEIGHTS)
    assert len(given.choices(given.offered(shape))) == len(ladder(shape)), "a codec that is asked for has components"


def test_ranks_that_are_given_are_cut_to_the_shorter_side():
    grid = grid_of((), (8, 24, 0, 24), 20, WEIGHTS)
    assert [grid.offered(shape) for shape in ((32, 32), (16, 32))] == [(0, 8, 24), (0, 8, 16)]
    assert [grid.fixed(shape) for shape in ((32, 32), (16, 32))] == [20, 16]
    assert [grid.measured(shape, with_fixed=True) for shape in ((32, 32), (16, 32))] == [(0, 8, 20, 24), (0, 8, 16)]


def test_without_0_among_the_given_ranks_it_is_measured_and_not_offered():
    grid = grid_of((), (8,), 4, WEIGHTS)
    assert grid.offered((32, 32)) == (8,)
    assert grid.measured((32, 32), with_fixed=True) == (0, 4, 8)
    assert grid.measured((32, 32), with_fixed=False) == (0, 8)


def test_candidates_are_every_codec_at_every_rank():
    grid = grid_of(("nf2-16-2x64", "nf3-16-3x64", "nf2-16-2x64"), (), 4, WEIGHTS)
    pairs = [(choice.codec, choice.rank) for choice in grid.choices((0, 2))]
    assert pairs == [(codec_named(name), rank) for rank in (0, 2) for name in ("nf2-16-2x64", "nf3-16-3x64")]


@pytest.mark.parametrize(
    ("codecs", "ranks", "rank", "sentence"),
    [
        (("int4", "nf3-64-fp32"), (), 4, "^--codecs: codec 'int4' is unknown; a codec is nf4 or nf4.dq"),
        (("nf7-64-fp32", "int4"), (), 4, "^--codecs: codec 'nf7-64-fp32': .*; --codecs: codec 'int4' is unknown"),
        (("nf4", "nf3-64-fp32"), (), 4, "^--codecs: nf4 .bitsandbytes. cannot be mixed with other codecs"),
        ((), (4, 33, -1), 4, r"^--ranks -1, 33 are outside 0..32, the ranks of the largest weights$"),
        ((), (), -2, "^--rank -2 is negative; 0 means no components$"),
    ],
)
def test_what_is_none_is_refused(codecs, ranks, rank, sentence):
    with pytest.raises(ValueError, match=sentence):
        grid_of(codecs, ranks, rank, WEIGHTS)


def test_bitsandbytes_alone_is_fine():
    assert grid_of(("nf4",), (), 0, WEIGHTS).codecs == ("nf4",)


def test_stored_bytes_are_codes_scales_and_16_bit_factors():
    choice = Choice(codec_named("nf4-64-fp16"), 4)
    assert counted_bytes(choice, (64, 128), 2, "stored") == 64 * 128 // 2 + 2 * 128 + 2 * 4 * (64 + 128)


def test_training_counts_the_factors_in_float32_their_gradient_and_two_8_bit_moments():
    choice = Choice(codec_named("nf4-64-fp16"), 64)
    residual, numbers = 64 * 128 // 2 + 2 * 128, 64 * (64 + 128)  # 4096 and 8192 numbers: both get 8-bit state
    moments = 2 * (numbers + 4 * numbers // 256)
    assert counted_bytes(choice, (64, 128), 2, "training") == residual + 4 * numbers + 4 * numbers + moments


def test_training_counts_small_factors_with_float32_moments_and_none_without():
    choice = Choice(codec_named("nf4-64-fp16"), 2)
    residual = 64 * 128 // 2 + 2 * 128
    assert counted_bytes(choice, (64, 128), 2, "training") == residual + 16 * 2 * (64 + 128)
    assert counted_bytes(Choice(choice.codec, 0), (64, 128), 2, "training") == residual
