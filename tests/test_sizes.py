"""Sizes as people write them."""

import pytest

from qsvd.errors import parse_size, show_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24e9),
        ("1.5 TB", 1.5e12),
        ("500mb", 5e8),
        (" 100KB ", 1e5),
        ("0.5GB", 5e8),
        ("24GiB", 24 * 2**30),
        ("24564 mib", 24564 * 2**20),
        ("24", 24e9),
        ("24G", 24e9),
        ("24 g", 24e9),
        ("1.5T", 1.5e12),
        ("24Gi", 24 * 2**30),
    ],
)
def test_a_number_and_a_unit_are_decimal_bytes(text, size):
    assert parse_size(text, "--gpu") == size


@pytest.mark.parametrize("text", ["", "GB", "24i", "-1GB", "24 X", "1e3GB", "0GB", "24GBB", "24 B 1", "0"])
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError, match=r"--gpu .* is not a size: give a number of GB, or one and KB, MB, GB or TB"):
        parse_size(text, "--gpu")


def test_a_size_may_have_to_be_large_enough():
    with pytest.raises(ValueError, match="is not a size of at least 100 KB"):
        parse_size("99KB", "--shard-size", least=100_000)


@pytest.mark.parametrize(
    ("size", "text"),
    [(24 * 10**9, "24 GB"), (1_500_000, "1.5 MB"), (123, "123 bytes"), (10**15, "1,000 TB"), (0, "0 bytes")],
)
def test_a_size_is_shown_in_the_largest_unit(size, text):
    assert show_size(size) == text
