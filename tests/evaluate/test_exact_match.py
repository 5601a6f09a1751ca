"""Answers of a model whose every answer is known, and of trained models against a plain loop."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from qsvd.evaluate.exact_match import ExactMatch, exact_match
from tests.evaluate.tiny import EMPTY_BATCH, IN_TRAINING, refused, shared

DEMO = Path(__file__).parents[2] / "qsvd" / "demo" / "model"
WORDS = ["<eos>", "<stop>", "q1", "q2", "q3", "q4", "q5", "is", "72", "####", "1,000.00", "on", "5", "none"]
NEXT = {  # what follows each word, always; an end is followed by another answer, which must not be read
    **{"q1": "is", "is": "72", "72": "<eos>", "q2": "####", "####": "1,000.00", "1,000.00": "<stop>"},
    **{"q3": "on", "on": "5", "5": "on", "q4": "none", "none": "<eos>", "q5": "<eos>", "<eos>": "is", "<stop>": "5"},
}
QUESTIONS = [[12, 2], [3], [12, 12, 11, 4], [5], [7, 9, 6]]  # ending in q1..q5
ANSWERS = ["so it is 72\n#### 72", "$1000", "5.0", "#### 3", "0"]
SAID = ("is 72", "#### 1,000.00", "on 5 on 5", "none", "")


def tokenizer_of(words, eos_token):
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="none"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos_token)


def table_model(ends=1):
    """A model that looks the next word up in NEXT: its layers add nothing, its head is the table."""
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        eos_token_id=ends,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(len(WORDS), 16))
        model.lm_head.weight.zero_()
        for word, following in NEXT.items():
            model.lm_head.weight[WORDS.index(following), WORDS.index(word)] = 1
    return model


TOKENIZER = tokenizer_of(WORDS, "<eos>")


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_answers_are_read_to_either_end_token_and_compared_by_their_number(batch):
    result = exact_match(table_model(), QUESTIONS, ANSWERS, TOKENIZER, max_new_tokens=4, batch=batch)
    assert result == ExactMatch(correct=3, total=5, unfinished=1, answers=SAID)
    assert result.share == 0.6
    assert result.interval == pytest.approx((0.2307, 0.8824), abs=5e-5)  # Wilson, by a table


@pytest.mark.parametrize(("limit", "unfinished", "said"), [(1, 4, "is"), (2, 3, "is 72"), (3, 1, "is 72")])
def test_an_answer_without_an_end_token_is_unfinished(limit, unfinished, said):
    result = exact_match(table_model(), QUESTIONS, ANSWERS, TOKENIZER, max_new_tokens=limit)
    assert result.unfinished == unfinished
    assert result.answers[0] == said


@pytest.mark.parametrize("ends", [None, [1], [0, 1]])
def test_the_end_tokens_are_the_tokenizers_and_the_models(ends):
    model = table_model()
    model.generation_config.eos_token_id = ends
    answers = exact_match(model, QUESTIONS[:2], ANSWERS[:2], TOKENIZER, max_new_tokens=4).answers
    assert answers[0] == "is 72"
    assert answers[1] == ("#### 1,000.00" if ends else "#### 1,000.00 <stop> 5")


def greedy(model, tokens, count):
    """The most probable token, one after the other, each from the whole text before it."""
    tokens = list(tokens)
    for _ in range(count):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[-count:]


PROMPTS = (
    "Once upon a time",
    "Lily had 3 apples and 5",
    "The",
    "One day, Tom and his mom went out. They saw a big red",
)


@pytest.fixture(scope="module", params=["stories260K", "demo"])
def trained(request):
    folder = DEMO if request.param == "demo" else shared("models/stories260K")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, tokenizer, [tokenizer.encode(prompt) for prompt in PROMPTS]


def test_a_batch_of_a_trained_model_says_what_it_says_alone(trained):
    model, tokenizer, questions = trained
    expected = tuple(tokenizer.decode(greedy(model, question, 10)) for question in questions)
    results = [
        exact_match(model, questions, ["1", "2", "3", "4"], tokenizer, max_new_tokens=10, batch=batch)
        for batch in (1, 4)
    ]
    assert results[0] == results[1]
    assert results[0].answers == expected
    assert results[0].unfinished == 4


@pytest.fixture
def warned(caplog):
    """What transformers logs, also what it says once in a process."""
    transformers_logging.warning_once.cache_clear()
    return caplog


def test_the_models_own_sampling_penalties_and_beams_are_set_aside(trained, warned):
    model, tokenizer, questions = trained
    before = exact_match(model, questions, ["1", "2", "3", "4"], tokenizer, max_new_tokens=30)
    assert not warned.records
    own = {
        **{
            "do_sample": True,
            "temperature": 5.0,
            "top_p": 0.5,
            "top_k": 7,
            "num_beams": 3,
            "return_dict_in_generate": 1,
        },
        **{"repetition_penalty": 3.0, "no_repeat_ngram_size": 2, "num_return_sequences": 2},
    }
    kept = {name: getattr(model.generation_config, name) for name in own}
    try:
        model.generation_config.update(**own)
        assert exact_match(model, questions, ["1", "2", "3", "4"], tokenizer, max_new_tokens=30) == before
        assert not warned.records
    finally:
        model.generation_config.update(**kept)


def test_the_models_own_lengths_are_set_aside():
    model = table_model()
    model.generation_config.update(min_length=14, max_length=1)
    assert measure(model=model).answers == SAID


def test_a_pad_token_that_the_model_has_no_row_for_is_not_used():
    model = table_model()
    model.generation_config.pad_token_id = len(WORDS)  # as in checkpoints whose tokenizer got a pad token later
    assert measure(model=model, batch=5).answers == SAID


def test_generation_stops_at_the_last_end_and_reads_each_token_once():
    widths, model = [], table_model(ends=None)
    model.generation_config.use_cache = False
    model.register_forward_pre_hook(lambda _, __, given: widths.append(given["input_ids"].shape[1]), with_kwargs=True)
    measure(model=model, questions=QUESTIONS[:1], answers=ANSWERS[:1], max_new_tokens=9)
    assert widths == [2, 1, 1]  # is 72 <eos>


def measure(questions=QUESTIONS, answers=ANSWERS, model=None, **changes):
    options = {"max_new_tokens": 4, "batch": 2} | changes
    return exact_match(model or table_model(), questions, answers, TOKENIZER, **options)


def test_answers_without_a_number_are_named():
    with refused(r"answer 1 \('none'\), 3 \('7 #### '\) has no final number to compare with"):
        measure(answers=["1", "none", "2", "7 #### ", "3"])


def test_as_many_answers_as_questions_are_needed():
    with refused("5 questions have 4 answers: give one to each"):
        measure(answers=ANSWERS[:4])


def test_a_model_that_generates_no_text_is_refused():
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = BertForSequenceClassification(BertConfig(vocab_size=20, **shape)).eval()
    with refused("BertForSequenceClassification generates no text: load the model as AutoModelForCausalLM"):
        measure(model=model)


def test_a_model_without_an_end_token_is_refused():
    sentence = "neither the tokenizer nor the model's generation config names an end token: set eos_token"
    model = table_model(ends=None)
    with refused(sentence):
        exact_match(model, QUESTIONS, ANSWERS, tokenizer_of(WORDS, None), max_new_tokens=4)


def test_bad_arguments_are_refused():
    with refused("max_new_tokens 0 is below 1"):
        measure(max_new_tokens=0)
    with refused(EMPTY_BATCH):
        measure(batch=0)
    with refused(IN_TRAINING):
        measure(model=table_model().train())
    with refused("no examples to measure a model on"):
        measure(questions=[], answers=[])
    with refused(
        r"example 2 \(4\) has more tokens than the 16 positions of the model, 13 of them for the generated text: "
        "shorten or drop them"
    ):
        measure(max_new_tokens=13)
