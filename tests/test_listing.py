"""Short sentences from long lists."""

import pytest

from qsvd.errors import first_line, listing


def test_listing_says_how_many_names_it_leaves_out():
    assert listing(["a", "b"], 2) == "a, b"
    assert listing(["a", "b", "c", "d"], 2) == "a, b and 2 more"


@pytest.mark.parametrize(
    ("text", "line"),
    [("one\ntwo", "one"), ("one:\n two\nthree", "one: two"), ("", "RuntimeError"), ("\n", "RuntimeError")],
)
def test_errors_of_libraries_are_cut_to_a_line(text, line):
    assert first_line(RuntimeError(text)) == line
