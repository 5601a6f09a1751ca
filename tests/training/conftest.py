"""Bases that are made once."""

import pytest

from tests.runs import classifier_base, language_base, text_rows, write_rows


@pytest.fixture(scope="session")
def language(tmp_path_factory):
    """A language model at rank 16."""
    return language_base(tmp_path_factory.getbasetemp() / "language")


@pytest.fixture(scope="session")
def classifier(tmp_path_factory):
    """A BERT without a head at rank 4."""
    return classifier_base(tmp_path_factory.getbasetemp() / "bert")


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A file of short texts."""
    return write_rows(tmp_path_factory.mktemp("texts") / "texts.jsonl", text_rows())
