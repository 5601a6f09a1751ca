"""Spans of time against the set of all moments that they hold."""

import random
from itertools import pairwise

from seventy_profile import common, merged

SEEDS = range(300)


def moments(spans):
    """Every whole microsecond that begins inside a span."""
    return {moment for begin, end in spans for moment in range(begin, end)}


def drawn(draws):
    begins = [draws.randrange(40) for _ in range(draws.randrange(9))]
    return [(begin, begin + draws.randrange(8)) for begin in begins]


def test_merged_spans_hold_the_same_moments_once_and_in_order():
    for seed in SEEDS:
        spans = drawn(random.Random(seed))
        found = merged(iter(spans))
        assert moments(found) == moments(spans)
        assert sum(end - begin for begin, end in found) == len(moments(spans))
        ends = [moment for span in found for moment in span]
        assert ends == sorted(ends)
        assert all(before < after for (_, before), (after, _) in pairwise(found))


def test_common_moments_are_counted_once():
    for seed in SEEDS:
        draws = random.Random(seed)
        left, right = merged(drawn(draws)), merged(drawn(draws))
        assert common(left, right) == len(moments(left) & moments(right)) == common(right, left)
