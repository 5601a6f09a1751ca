"""Divergence against SciPy's relative entropy on raw logits, its statistics against SciPy and the standard library."""

import copy
import statistics

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.special import log_softmax, rel_entr, softmax
from scipy.stats import sem
from transformers import AutoModelForCausalLM, AutoTokenizer

from qsvd.evaluate import divergence as module
from qsvd.evaluate.divergence import divergence_of_documents, divergence_of_text
from tests.evaluate.tiny import (
    EMPTY_BATCH,
    IN_TRAINING,
    ROUNDOFF,
    VOCABULARY,
    llama,
    logits_of,
    refused,
    shared,
    sliding_windows,
    tokens_of,
)

PEFT_IS_BEHIND = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
TEXT = tokens_of([100])[0]
DOCUMENTS = tokens_of([5, 0, 40, 1, 12, 12, 33, 2])


def perturbed(model, scale, seed=1):
    """A copy whose matrices have noise of a relative size, as after quantization."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in other.parameters():
            weight += scale * weight.std(correction=0) * torch.randn(weight.shape, generator=generator)
    return other


REFERENCE = llama()
MODEL = perturbed(REFERENCE, 0.1)


class Expected:
    """Values of each prediction, from logits of one window at a time."""

    def __init__(self, model, reference, windows):
        rows, kept = [], {}
        for tokens, position in windows:
            key = tuple(tokens)
            if key not in kept:
                kept[key] = [logits_of(each, tokens) for each in (model, reference)]
            ours, theirs = (logits[position - 1] for logits in kept[key])
            nats = [-log_softmax(logits)[tokens[position]] for logits in (ours, theirs)]
            rows.append([rel_entr(softmax(theirs), softmax(ours)).sum(), *nats, ours.argmax() == theirs.argmax()])
        self.divergence, self.model, self.reference, self.agree = np.array(rows).T

    def check(self, result, relative, bound=1e-300):
        """Compare all fields; `bound` is the error that one token's divergence may have."""
        hundredths = statistics.quantiles(self.divergence, n=100, method="inclusive")
        expected = {
            "mean": self.divergence.mean(),
            "mean_error": sem(self.divergence),
            "median": statistics.median(self.divergence),
            "percentile_90": hundredths[89],
            "percentile_95": hundredths[94],
            "percentile_99": hundredths[98],
            "maximum": self.divergence.max(),
            "top_token_agreement": self.agree.mean(),
            "top_token_agreement_error": sem(self.agree),
            "nats_model": self.model.mean(),
            "nats_reference": self.reference.mean(),
            "log_perplexity_ratio_error": sem(self.model - self.reference),
        }
        found = {name: getattr(result, name) for name in expected}
        assert found == {name: pytest.approx(value, rel=relative, abs=bound) for name, value in expected.items()}
        assert result.log_perplexity_ratio == pytest.approx(
            self.model.mean() - self.reference.mean(), abs=10 * relative
        )
        assert result.tokens == len(self.divergence)


def of_documents(model, reference, documents, window):
    cut = [document[:window] for document in documents]
    return Expected(model, reference, [(tokens, place) for tokens in cut for place in range(1, len(tokens))])


# A logit of size L is off by L * ROUNDOFF in another order of summation, and a log-probability ratio by twice that.
BOUND = 50 * ROUNDOFF


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_documents_are_compared_prediction_by_prediction(batch):
    expected = of_documents(MODEL, REFERENCE, DOCUMENTS, window=12)
    assert 0.2 < expected.agree.mean() < 0.95
    assert expected.divergence.std() > 0.05
    result = divergence_of_documents(MODEL, REFERENCE, iter(DOCUMENTS), window=12, batch=batch)
    expected.check(result, ROUNDOFF, BOUND)


@pytest.mark.parametrize(("window", "stride"), [(16, 16), (16, 5), (16, 1), (200, 7), (99, 99)])
def test_a_text_is_compared_in_the_windows_that_perplexity_uses(window, stride):
    windows = [(TEXT[start:end], place - start) for start, end, place in sliding_windows(100, window, stride)]
    expected = Expected(MODEL, REFERENCE, windows)
    result = divergence_of_text(MODEL, REFERENCE, TEXT, window=window, stride=stride, batch=4)
    expected.check(result, ROUNDOFF, BOUND)


def test_which_model_is_the_reference_matters():
    there = divergence_of_documents(MODEL, REFERENCE, DOCUMENTS, window=12)
    back = divergence_of_documents(REFERENCE, MODEL, DOCUMENTS, window=12)
    assert abs(there.mean - back.mean) > 0.01 * there.mean
    assert (there.nats_model, there.nats_reference) == (back.nats_reference, back.nats_model)
    assert there.log_perplexity_ratio == -back.log_perplexity_ratio != 0


def test_a_model_does_not_diverge_from_itself():
    result = divergence_of_text(REFERENCE, copy.deepcopy(REFERENCE), TEXT, window=16, stride=5)
    assert result.mean == result.mean_error == result.median == result.percentile_99 == result.maximum == 0
    assert (result.top_token_agreement, result.top_token_agreement_error) == (1, 0)
    assert result.log_perplexity_ratio == result.log_perplexity_ratio_error == 0


def test_a_tiny_divergence_is_not_lost_in_rounding():
    model = copy.deepcopy(REFERENCE)
    with torch.no_grad():
        model.lm_head.weight *= 1 + 2.0**-16
    expected = of_documents(model, REFERENCE, [TEXT], window=100)
    assert expected.divergence.max() < 1e-8  # where float32 arithmetic has an error of 1e-7
    result = divergence_of_documents(model, REFERENCE, [TEXT], window=100, batch=1)
    assert result.mean == pytest.approx(expected.divergence.mean(), rel=1e-3)  # float64 leaves 1e-15 of 1e-10
    assert result.maximum == pytest.approx(expected.divergence.max(), rel=1e-3)


@pytest.mark.parametrize("chunk", [1, 7 * VOCABULARY])
def test_chunks_of_positions_change_nothing(monkeypatch, chunk):
    whole = divergence_of_documents(MODEL, REFERENCE, DOCUMENTS, window=40)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk)
    parts = divergence_of_documents(MODEL, REFERENCE, DOCUMENTS, window=40)
    assert vars(parts) == {name: pytest.approx(value, rel=1e-12) for name, value in vars(whole).items()}


def test_a_bf16_model_is_compared_with_float32():
    model = copy.deepcopy(REFERENCE).to(torch.bfloat16)
    expected = of_documents(model, REFERENCE, [TEXT], window=100)
    expected.check(divergence_of_documents(model, REFERENCE, [TEXT], window=100), ROUNDOFF, BOUND)


def excluding(token, value=-torch.inf):
    """The reference with one logit that is always `value`."""
    model = copy.deepcopy(REFERENCE)

    def replace(_module, _inputs, logits):
        return logits.index_fill(-1, torch.tensor([token]), value)

    model.lm_head.register_forward_hook(replace)
    return model


def test_a_token_that_the_reference_excludes_costs_nothing_and_one_that_the_model_excludes_costs_all():
    text = [token for token in TEXT if token != 7]
    expected = of_documents(MODEL, excluding(7), [text], window=100)
    assert np.isfinite(expected.divergence).all()
    expected.check(divergence_of_documents(MODEL, excluding(7), [text], window=100), ROUNDOFF, BOUND)
    both = divergence_of_documents(excluding(7), excluding(7), [text], window=100)
    assert (both.mean, both.maximum, both.top_token_agreement) == (0, 0, 1)


@pytest.mark.filterwarnings("ignore:invalid value encountered in subtract:RuntimeWarning")
def test_a_token_that_the_model_excludes_costs_all():
    assert divergence_of_documents(excluding(7), REFERENCE, [TEXT], window=100).mean == np.inf


@pytest.mark.parametrize("broken", ["model", "reference"])
def test_not_a_number_stays_one(broken):
    bad = excluding(7, torch.nan)
    pair = (bad, REFERENCE) if broken == "model" else (REFERENCE, bad)
    result = divergence_of_documents(*pair, [TEXT], window=100)
    assert np.isnan([result.mean, result.median, result.maximum]).all()


@PEFT_IS_BEHIND
def test_an_adapted_model_is_compared_with_its_base():
    torch.manual_seed(2)
    model = get_peft_model(llama(), LoraConfig(r=2, init_lora_weights=False)).eval()
    expected = of_documents(model, REFERENCE, DOCUMENTS, window=12)
    expected.check(divergence_of_documents(model, REFERENCE, DOCUMENTS, window=12), ROUNDOFF, BOUND)


def test_a_trained_model_loses_little_by_a_little_noise():
    folder = shared("models/stories260K")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    text = "Once upon a time there was a girl. Her name was Lily. She saw a big red ball in the park and was happy."
    tokens = AutoTokenizer.from_pretrained(folder).encode(text)
    noisy = perturbed(model, 0.05)
    expected = of_documents(noisy, model, [tokens], window=512)
    result = divergence_of_text(noisy, model, tokens, window=512, stride=256)
    expected.check(result, 4 * ROUNDOFF, BOUND)
    assert 0.001 < result.mean < 0.5
    assert result.top_token_agreement > 0.7


def test_vocabularies_of_two_sizes_are_refused():
    sentence = (
        "the model predicts over 61 tokens and the reference over 64: compare a model with the one it was made from"
    )
    with refused(sentence):
        divergence_of_documents(MODEL, llama(vocab_size=64), [TEXT], window=8)


def test_fewer_than_two_predictions_are_refused():
    for documents, count in (([], 0), ([[3], [4]], 0), ([[1, 2]], 1)):
        with refused(f"predicted tokens: {count}, too few to compare two models: a standard error needs 2"):
            divergence_of_documents(MODEL, REFERENCE, documents, window=8)


def test_bad_arguments_are_refused():
    with refused("window 1 is below 2: one token predicts the next"):
        divergence_of_documents(MODEL, REFERENCE, [TEXT], window=1)
    for stride in (0, 9):
        with refused(rf"stride {stride} is outside 1\.\.8, the size of the window"):
            divergence_of_text(MODEL, REFERENCE, TEXT, window=8, stride=stride)
    with refused(EMPTY_BATCH):
        divergence_of_documents(MODEL, REFERENCE, [TEXT], window=8, batch=0)
    for pair in ((llama().train(), REFERENCE), (REFERENCE, llama().train())):
        with refused(IN_TRAINING):
            divergence_of_documents(*pair, [TEXT], window=8)
    with refused(rf"token {VOCABULARY} is outside 0\.\.{VOCABULARY - 1}, the vocabulary of the model"):
        divergence_of_text(MODEL, REFERENCE, [1, VOCABULARY], window=8, stride=8)
