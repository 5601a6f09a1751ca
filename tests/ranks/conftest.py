"""A base that the tests of all commands have, made once."""

import pytest

from tests.runs import language_base


@pytest.fixture(scope="session")
def language(tmp_path_factory):
    """A language model at rank 8, with its source beside it."""
    return language_base(tmp_path_factory.getbasetemp() / "rank-8", rank=8)
