"""Accuracy against one text at a time, without padding, and cross entropy in NumPy."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from qsvd.evaluate.accuracy import Accuracy, accuracy
from tests.evaluate.tiny import (
    EMPTY_BATCH,
    IN_TRAINING,
    PAD,
    ROUNDOFF,
    gpt2_classifier,
    llama,
    llama_classifier,
    logits_of,
    refused,
    shared,
    tokens_of,
)

# Lengths repeat and differ, none in order; a text that ends in the pad token is read where batching cannot change it.
TEXTS = [*tokens_of([5, 1, 17, 17, 3, 40, 9, 2, 1, 33, 12], PAD), [3, 4, PAD]]
EXAMPLES = [(tokens, i % 3 % 2) for i, tokens in enumerate(TEXTS)]


def one_by_one(model, examples):
    """Correct examples, mean cross entropy, and the least margin between two classes."""
    rows = np.array([logits_of(model, tokens) for tokens, _ in examples])
    labels = np.array([label for _, label in examples])
    top = np.sort(rows, axis=1)
    nats = logsumexp(rows, axis=1) - rows[np.arange(len(rows)), labels]
    return int((rows.argmax(axis=1) == labels).sum()), nats.mean(), (top[:, -1] - top[:, -2]).min()


@pytest.mark.parametrize("batch", [1, 4, 100])
@pytest.mark.parametrize("make", [llama_classifier, gpt2_classifier], ids=["llama", "gpt2"])
def test_a_decoder_is_right_as_often_in_batches_as_one_by_one(make, batch):
    model = make()
    correct, nats, margin = one_by_one(model, EXAMPLES)
    assert margin > 1e-3  # far above rounding, so that no top class is in doubt
    assert 0 < correct < len(EXAMPLES)
    result = accuracy(model, EXAMPLES, pad_token=PAD, batch=batch)
    assert (result.correct, result.total) == (correct, len(EXAMPLES))
    assert result.nats == pytest.approx(nats, rel=ROUNDOFF)


@pytest.fixture(scope="module")
def reviews():
    """MiniLM with a random head that tells texts apart, and 24 film reviews; a head of its own is not in the file."""
    tokenizer = AutoTokenizer.from_pretrained(shared("models/minilm-l6"))
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(shared("models/minilm-l6"), dtype=torch.float32)
    torch.nn.init.normal_(model.classifier.weight)
    lines = shared("data/sst2-dev.jsonl").read_text(encoding="utf-8").splitlines()[:24]
    rows = [json.loads(line) for line in lines]
    examples = [(tokenizer(row["text"])["input_ids"], row["label"]) for row in rows]
    return model.eval(), examples, one_by_one(model.eval(), examples)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [5, 24])
def test_an_encoder_is_right_as_often_in_batches_as_one_by_one(reviews, batch):
    model, examples, (correct, nats, margin) = reviews
    assert margin > 1e-3
    assert 0 < correct < len(examples)
    result = accuracy(model, examples, pad_token=0, batch=batch)
    assert (result.correct, result.total) == (correct, len(examples))
    assert result.nats == pytest.approx(nats, rel=4 * ROUNDOFF)  # six layers, sums four times as long or more


def test_a_bf16_model_is_judged_in_float32():
    model = llama_classifier().to(torch.bfloat16)
    _, nats, _ = one_by_one(model, EXAMPLES)
    assert accuracy(model, EXAMPLES, pad_token=PAD, batch=1).nats == pytest.approx(nats, rel=ROUNDOFF)


def test_the_share_and_its_interval_are_of_the_counts():
    result = Accuracy(correct=15, total=20, nats=0.5)
    assert result.share == 0.75
    assert result.interval == pytest.approx((0.5313, 0.8881), abs=5e-5)  # Wilson, by a table


def test_labels_that_are_no_class_are_named():
    with refused(r"label -1, 3 is outside 0\.\.2, the classes"):
        accuracy(llama_classifier(), [([1], 3), ([2], 0), ([1], -1)], pad_token=PAD)


def test_a_regression_model_is_refused():
    with refused("the model has 1 class, as for regression; accuracy needs 2 or more"):
        accuracy(llama_classifier(classes=1), [([1], 0)], pad_token=PAD)


@pytest.mark.parametrize("known", [5, None])
def test_a_pad_token_that_the_decoder_does_not_know_is_refused(known):
    sentence = (
        rf"pad token {PAD} is not {known}, the pad_token_id of the model's config, by which decoders find the end of "
        rf"a text: set model\.config\.pad_token_id = {PAD}, or give that pad token"
    )
    with refused(sentence):
        accuracy(llama_classifier(pad_token_id=known), EXAMPLES, pad_token=PAD)


def test_a_model_that_is_no_classifier_is_refused():
    sentence = (
        r"logits of 12 texts have shape \(12, 40, 61\), not one row of 2 classes each: load the model as "
        "AutoModelForSequenceClassification"
    )
    with refused(sentence):
        accuracy(llama(), EXAMPLES, pad_token=PAD)


def test_what_every_measure_refuses_is_refused():
    measure = partial(accuracy, pad_token=PAD)
    with refused(EMPTY_BATCH):
        measure(llama_classifier(), EXAMPLES, batch=0)
    with refused(IN_TRAINING):
        measure(llama_classifier().train(), EXAMPLES)
    with refused("no examples to measure a model on"):
        measure(llama_classifier(), [])
