"""Perplexity against NumPy on raw logits, against a plain loop, and against figures published with the data."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from qsvd.evaluate import perplexity as module
from qsvd.evaluate.perplexity import Perplexity, perplexity_of_documents, perplexity_of_text

SHARED = Path(__file__).parents[3] / "shared"
VOCABULARY = 61
PEFT_IS_BEHIND = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
ROUNDOFF = 64 * 2.0**-24  # float32 logits of a two-layer model, in another order of summation when batched
TEXT = [int(token) for token in np.random.default_rng(5).integers(0, VOCABULARY, 100)]


def tiny_llama(dtype=torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.4,  # large enough for predictions far from uniform
    )
    return LlamaForCausalLM(config).to(dtype).eval()


MODEL = tiny_llama()


def costs(model, tokens):
    """Negative log-likelihood of tokens[1:], from raw logits, in NumPy float64."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, :-1].float().numpy().astype(np.float64)
    top = logits.max(axis=1, keepdims=True)
    log_sums = np.log(np.exp(logits - top).sum(axis=1)) + top[:, 0]
    return log_sums - logits[np.arange(len(tokens) - 1), tokens[1:]]


def documents_of(lengths):
    return [[int(token) for token in np.random.default_rng(n).integers(0, VOCABULARY, n)] for n in lengths]


def test_the_tiny_model_is_far_from_uniform():
    assert costs(MODEL, TEXT).std() > 1  # else the tests below could not tell one position from the next


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_documents_are_cut_at_the_window_and_their_first_token_is_given(batch):
    documents = documents_of([5, 0, 40, 1, 12, 12, 33, 2, 12, 40, 41])
    expected = np.concatenate([costs(MODEL, document[:12]) for document in documents if len(document) > 1])
    result = perplexity_of_documents(MODEL, iter(documents), window=12, batch=batch)
    assert result.tokens == len(expected) == 4 + 7 * 11 + 1
    assert result.nats == pytest.approx(expected.mean(), rel=ROUNDOFF)
    assert result.perplexity == pytest.approx(math.exp(expected.mean()), rel=10 * ROUNDOFF)


def sliding_reference(tokens, window, stride):
    """Each token by itself: found in the first window that reaches it."""
    total = []
    for position in range(1, len(tokens)):
        later = max(0, math.ceil((position + 1 - window) / stride))
        end = min(window + later * stride, len(tokens))
        start = max(0, end - window) if stride < window else later * window
        if position > start:
            total.append(costs(MODEL, tokens[start:end])[position - start - 1])
    return np.array(total)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 60), st.integers(2, 24), st.data())
def test_sliding_windows_equal_a_loop_over_tokens(length, window, data):
    stride = data.draw(st.integers(1, window), "stride")
    batch = data.draw(st.integers(1, 5), "batch")
    expected = sliding_reference(TEXT[:length], window, stride)
    result = perplexity_of_text(MODEL, TEXT[:length], window=window, stride=stride, batch=batch)
    assert result.tokens == len(expected)
    assert result.nats == pytest.approx(expected.mean(), rel=ROUNDOFF)


@pytest.mark.parametrize(("stride", "predicted"), [(1, 99), (7, 99), (15, 99), (16, 100 - 7)])
def test_every_token_but_the_first_is_predicted_once_unless_windows_are_disjoint(stride, predicted):
    assert perplexity_of_text(MODEL, TEXT, window=16, stride=stride).tokens == predicted


def test_disjoint_windows_are_the_pieces_of_the_text_as_documents():
    pieces = [TEXT[start : start + 16] for start in range(0, len(TEXT), 16)]
    assert perplexity_of_text(MODEL, TEXT, window=16, stride=16) == perplexity_of_documents(MODEL, pieces, window=16)


def test_a_text_within_the_window_is_one_document():
    expected = perplexity_of_documents(MODEL, [TEXT], window=200)
    assert perplexity_of_text(MODEL, TEXT, window=200, stride=50) == expected


@pytest.mark.parametrize("chunk", [1, 7 * VOCABULARY])
def test_chunks_of_positions_change_only_rounding(monkeypatch, chunk):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk)
    result = perplexity_of_documents(MODEL, [TEXT], window=100)
    assert result.nats == pytest.approx(costs(MODEL, TEXT).mean(), rel=ROUNDOFF)


def test_a_bf16_model_is_judged_in_float32():
    model = tiny_llama(torch.bfloat16)
    result = perplexity_of_documents(model, [TEXT], window=100)
    assert result.nats == pytest.approx(costs(model, TEXT).mean(), rel=ROUNDOFF)  # bf16 would be off by 2**-9


SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
OTHERS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, intermediate_size=48, num_attention_heads=4)),
    "mamba": lambda: MambaForCausalLM(MambaConfig(**SMALL, state_size=4)),
    "lora": lambda: get_peft_model(tiny_llama(), LoraConfig(r=2, init_lora_weights=False)),
}


@PEFT_IS_BEHIND
@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_and_adapted_models_are_judged_alike(name):
    torch.manual_seed(1)
    model = OTHERS[name]().eval()
    documents = documents_of([20, 20, 9])
    expected = np.concatenate([costs(model, document) for document in documents]).mean()
    assert perplexity_of_documents(model, documents, window=20).nats == pytest.approx(expected, rel=ROUNDOFF)


@PEFT_IS_BEHIND
def test_virtual_tokens_of_prompt_tuning_are_context_and_not_text():
    torch.manual_seed(1)
    model = get_peft_model(tiny_llama(), PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)).eval()
    embedding = model.get_input_embeddings().weight
    rows = torch.cat([model.get_prompt(1)[0].detach(), embedding.detach()[torch.tensor(TEXT)]])
    with torch.no_grad():
        log_p = tiny_llama()(inputs_embeds=rows[None]).logits[0, 3:-1].double().log_softmax(-1)
    expected = -log_p[torch.arange(len(TEXT) - 1), torch.tensor(TEXT[1:])].mean().item()
    assert perplexity_of_documents(model, [TEXT], window=100).nats == pytest.approx(expected, rel=ROUNDOFF)


def test_the_perplexity_of_a_uniform_model_is_the_number_of_its_tokens():
    assert Perplexity(math.log(256), 50).perplexity == pytest.approx(256)


def test_a_perplexity_beyond_float64_is_infinite():
    assert Perplexity(1e4, 1).perplexity == math.inf


def refused(sentence):
    return pytest.raises(ValueError, match=f"^{sentence}$")


def test_bad_arguments_are_refused():
    with refused("window 1 is below 2: one token predicts the next"):
        perplexity_of_documents(MODEL, [TEXT], window=1)
    with refused("window 1 is below 2: one token predicts the next"):
        perplexity_of_text(MODEL, TEXT, window=1, stride=1)
    with refused("batch 0 is below 1"):
        perplexity_of_documents(MODEL, [TEXT], window=8, batch=0)
    for stride in (0, 9):
        with refused(rf"stride {stride} is outside 1\.\.8, the size of the window"):
            perplexity_of_text(MODEL, TEXT, window=8, stride=stride)


def test_a_text_without_a_token_to_predict_is_refused():
    for documents in ([], [[]], [[3], [4]]):
        with refused("no token to predict: every sequence has fewer than two tokens"):
            perplexity_of_documents(MODEL, documents, window=8)
    with refused("no token to predict: every sequence has fewer than two tokens"):
        perplexity_of_text(MODEL, [7], window=8, stride=4)


@pytest.mark.parametrize("token", [-1, VOCABULARY])
def test_a_token_outside_the_vocabulary_is_named(token):
    with refused(rf"token {token} is outside 0\.\.{VOCABULARY - 1}, the vocabulary of the model"):
        perplexity_of_documents(MODEL, [[1, token, 2]], window=8)


def test_a_model_in_training_mode_is_refused():
    with refused(r"the model is in training mode, in which dropout changes its predictions: call eval\(\) first"):
        perplexity_of_documents(tiny_llama().train(), [TEXT], window=8)


@pytest.fixture(scope="module")
def stories():
    """The stories260K model and the tokens of 100 stories; the tokenizer's encode puts the start token in front."""
    folder, texts = SHARED / "models" / "stories260K", SHARED / "data" / "tinystories-100.jsonl"
    for path in (folder, texts):
        if not path.exists():
            pytest.skip(f"../shared/{path.relative_to(SHARED)} is not there")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = texts.read_text(encoding="utf-8").splitlines()
    documents = [tokenizer.encode(json.loads(line)["text"]) for line in lines]
    assert {document[0] for document in documents} == {tokenizer.bos_token_id}
    return AutoModelForCausalLM.from_pretrained(folder), documents


@pytest.mark.slow
def test_the_published_perplexity_of_stories260k(stories):
    model, documents = stories
    result = perplexity_of_documents(model, documents[:60], window=512)
    assert result.perplexity == pytest.approx(3.6545, abs=0.5e-4)  # half of its last digit
