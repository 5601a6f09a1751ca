"""Loss of masked examples against the loss that transformers and PEFT return for one example at a time."""

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from qsvd.data.columns import UNTRAINED
from qsvd.evaluate import perplexity
from qsvd.evaluate.accuracy import mean_loss
from tests.evaluate.tiny import (
    EMPTY_BATCH,
    IN_TRAINING,
    PAD,
    ROUNDOFF,
    VOCABULARY,
    gpt2,
    llama,
    refused,
    shared,
    tokens_of,
)

PEFT_IS_BEHIND = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def masked(texts):
    """Labels with a masked question in front, one with a hole, one all masked, one all counted."""
    examples = [(tokens, [UNTRAINED] * (len(tokens) // 2) + tokens[len(tokens) // 2 :]) for tokens in texts]
    hole, nothing, whole = texts[0], texts[1], texts[2]
    examples[0] = (hole, [*hole[:2], UNTRAINED, *hole[3:-1], UNTRAINED])
    examples[1] = (nothing, [UNTRAINED] * len(nothing))
    examples[2] = (whole, list(whole))
    return examples


EXAMPLES = masked(tokens_of([9, 6, 17, 1, 17, 2, 30, 5]))


def one_by_one(model, examples):
    """Mean nats and count: transformers' mean of each example, weighted by what it counts."""
    total, count = 0.0, 0
    for tokens, labels in examples:
        counted = sum(label != UNTRAINED for label in labels[1:])
        if counted:  # else transformers' mean is 0 / 0
            with torch.no_grad():
                loss = model(input_ids=torch.tensor([tokens]), labels=torch.tensor([labels])).loss
            total, count = total + counted * loss.item(), count + counted
    return total / count, count


MODELS = {
    "llama": llama,
    "gpt2": gpt2,
    "lora": lambda: get_peft_model(llama(), LoraConfig(r=2, init_lora_weights=False)),
}


@PEFT_IS_BEHIND
@pytest.mark.parametrize("batch", [1, 3, 100])
@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_transformers_own(name, batch):
    model = MODELS[name]().eval()
    nats, count = one_by_one(model, EXAMPLES)
    result = mean_loss(model, EXAMPLES, pad_token=PAD, batch=batch)
    assert result.tokens == count == 6 + 0 + 16 + 0 + 9 + 1 + 15 + 3
    assert result.nats == pytest.approx(nats, rel=ROUNDOFF)


@PEFT_IS_BEHIND
def test_virtual_tokens_of_prompt_tuning_are_context_and_not_text():
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)
    model = get_peft_model(llama(), config).eval()
    # PEFT predicts a first token from the virtual ones; with the first masked, both count the same labels.
    examples = [(tokens, [UNTRAINED, *labels[1:]]) for tokens, labels in EXAMPLES]
    nats, count = one_by_one(model, examples)
    result = mean_loss(model, examples, pad_token=PAD, batch=3)
    assert (result.nats, result.tokens) == (pytest.approx(nats, rel=ROUNDOFF), count)


def test_the_pad_token_does_not_matter():
    results = {mean_loss(llama(), EXAMPLES, pad_token=pad).nats for pad in (0, 7, PAD)}
    assert len(results) == 1


@pytest.mark.parametrize("chunk", [1, 3 * VOCABULARY])
def test_chunks_of_positions_change_only_rounding(monkeypatch, chunk):
    nats, count = one_by_one(llama(), EXAMPLES)
    monkeypatch.setattr(perplexity, "CHUNK_ELEMENTS", chunk)
    result = mean_loss(llama(), EXAMPLES, pad_token=PAD)
    assert (result.nats, result.tokens) == (pytest.approx(nats, rel=ROUNDOFF), count)


def test_a_trained_model_in_bf16_is_judged_in_float32():
    folder = shared("models/stories260K")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    texts = [tokenizer.encode(text) for text in ("Once upon a time", "Lily saw a big red ball.", "Tom was sad.")]
    examples = [(tokens, [UNTRAINED, UNTRAINED, *tokens[2:]]) for tokens in texts]
    nats, _ = one_by_one(model, examples)
    assert nats < 3  # of ln 512 = 6.2: it reads the text
    assert mean_loss(model, examples, pad_token=0).nats == pytest.approx(nats, rel=4 * ROUNDOFF)
    model = model.to(torch.bfloat16)
    nats, _ = one_by_one(model, examples)  # transformers' loss is float32 too
    assert mean_loss(model, examples, pad_token=0, batch=1).nats == pytest.approx(nats, rel=ROUNDOFF)


def test_labels_of_another_number_than_tokens_are_named():
    with refused(
        r"example 0 \(1 for 2\), 2 \(3 for 1\) has another number of labels than of tokens: give one label a token"
    ):
        mean_loss(llama(), [([1, 2], [1]), ([1], [1]), ([1], [1, 2, 3])], pad_token=PAD)


def test_labels_that_are_already_shifted_are_named():
    sentence = r"example 0 at 0 \(2 for 1\), 0 at 1 \(3 for 2\) has a label that is neither its token nor -100"
    with refused(sentence):
        mean_loss(llama(), [([1, 2, 3], [2, 3, UNTRAINED])], pad_token=PAD)


def test_examples_without_a_label_to_predict_are_refused():
    with refused("no label to predict: all labels after the first of each example are -100"):
        mean_loss(llama(), [([1, 2], [1, UNTRAINED]), ([4], [4])], pad_token=PAD)


def test_what_every_measure_refuses_is_refused():
    with refused(EMPTY_BATCH):
        mean_loss(llama(), EXAMPLES, pad_token=PAD, batch=0)
    with refused(IN_TRAINING):
        mean_loss(llama().train(), EXAMPLES, pad_token=PAD)
    with refused("no examples to measure a model on"):
        mean_loss(llama(), [], pad_token=PAD)
