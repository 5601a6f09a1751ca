"""Cells of tables, by hand."""

import pytest

from qsvd.report.errors import estimate, number, short_count


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        (0, "0"),
        (0.0925, "0.09250"),
        (12.344, "12.34"),
        (-3.5, "-3.500"),
        (1234.4, "1234"),
        (9999.4, "9999"),
        (9999.7, "1.000e+04"),
        (12345, "1.234e+04"),  # a tie rounds to even
        (0.0001, "0.0001000"),
        (0.000099994, "9.999e-05"),
        (0.000099996, "0.0001000"),
        (float("inf"), "inf"),
    ],
)
def test_numbers_have_four_significant_digits(value, cell):
    assert number(value) == cell


def test_an_estimate_shows_its_standard_error_and_an_exact_norm_none():
    assert estimate(12.3456, 0.0789) == "12.35 ± 0.079"
    assert estimate(12.3456, 0.0) == "12.35"


@pytest.mark.parametrize(
    ("count", "cell"),
    [
        (999_999, "999,999"),
        (1_000_000, "1.000 M"),
        (67_108_864, "67.11 M"),
        (68_451_041_280, "68.45 G"),
        (10**12, "1.000 T"),
    ],
)
def test_counts_are_short(count, cell):
    assert short_count(count) == cell
