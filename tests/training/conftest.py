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
def translator(tmp_path_factory):
    """A tiny random T5 at rank 4, without dropout."""
    changes = {"vocab_size": 4096, "pad_token_id": 2, "dropout_rate": 0.0, "decoder_start_token_id": 0}
    return classifier_base(tmp_path_factory.getbasetemp() / "t5", architecture="T5ForConditionalGeneration", **changes)


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A file of short texts."""
    return write_rows(tmp_path_factory.mktemp("texts") / "texts.jsonl", text_rows())
