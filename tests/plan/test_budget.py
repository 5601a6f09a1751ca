"""Budgets as people write them."""

import re

import pytest

from qsvd.plan.budget import parse_budget
from tests.plan.weights import specs

WEIGHTS = specs(layers=40)
NUMBERS = 40 * (32 * 32 + 16 * 32 + 32 * 80)  # 163,840: 327,680 bytes in 16 bits


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("2.75bits", 56_320),
        ("2.75 bits", 56_320),
        ("3BITS", 61_440),
        ("1bit", 20_480),
        ("2.1bits", 43_008),
        ("0.1bits", 2_048),
        ("16bits", 327_680),
        ("50KB", 50_000),
        ("50 kib", 51_200),
        ("0.2MB", 200_000),
        ("0.0001GiB", 107_374),
    ],
)
def test_bits_are_for_each_number_and_bytes_for_all(text, num_bytes):
    assert parse_budget(text, WEIGHTS).num_bytes == num_bytes


@pytest.mark.parametrize(
    "text", ["", "3", "bits", "3 bytes", "3 apples", "-3bits", "3b", "2,75bits", "3bitsy", "nan bits"]
)
def test_a_text_that_is_not_a_budget_is_refused_with_examples(text):
    sentence = (
        f"--budget {text!r} is not a budget: give bits per number of the weights, such as 2.75bits, or bytes for all "
        "weights in KB, MB, GB, TB, KiB, MiB, GiB or TiB, such as 20GB"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        parse_budget(text, WEIGHTS)


def test_a_size_that_cannot_be_read_is_refused_as_sizes_are():
    with pytest.raises(ValueError, match="--budget 'many GB' is not a size"):
        parse_budget("many GB", WEIGHTS)


@pytest.mark.parametrize(("text", "most"), [("16.01bits", "16.000bits"), ("1MB", "0.328MB"), ("1GiB", "0.001GiB")])
def test_more_than_16_bits_is_refused(text, most):
    with pytest.raises(ValueError, match=f"--budget {text} is above 16 bits a number .{most}., the size of"):
        parse_budget(text, WEIGHTS)


@pytest.mark.parametrize("unit", ["bits", "KB", "MiB", "GB"])
def test_the_budget_that_a_message_calls_enough_is_enough(unit):
    budget = parse_budget({"bits": "1bits", "KB": "1KB", "MiB": "0.1MiB", "GB": "0.0001GB"}[unit], WEIGHTS)
    for needed in (1, 56_321, 61_439, 327_679):
        enough = budget.enough(needed)
        assert enough.endswith(unit)
        found = re.fullmatch(r"([\d.]+)[A-Za-z]+", enough)
        size = {"bits": NUMBERS / 8, "KB": 1e3, "MiB": 2**20, "GB": 1e9}[unit]
        assert needed <= float(found[1]) * size + 1e-6 <= needed + 0.001 * size + 1
