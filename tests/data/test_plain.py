"""Text and pairs without a template, on the tokenizers of three real models, judged by decoding and by TRL's rule."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsvd.data.columns import UNTRAINED
from qsvd.data.plain import start_tokens
from qsvd.data.tokens import question_prompts
from tests.data.templates import SHARED, demo, shared, tokenized

DEMO = demo()
MODELS = {"demo": lambda: DEMO, "stories260K": lambda: shared("stories260K")}
LINES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=15).map(lambda text: f"a{text}b")


@pytest.fixture(params=MODELS)
def tokenizer(request):
    return MODELS[request.param]()


def split(result, index=0):
    """The tokens before the first trained one, and those from there on, which all must be trained."""
    ids, labels = result.input_ids[index], result.labels[index]
    first = next(at for at, label in enumerate(labels) if label != UNTRAINED)
    assert labels == [UNTRAINED] * first + ids[first:]
    return ids[:first], ids[first:]


def test_prompt_and_completion_are_the_text_as_it_stands(tokenizer):
    result = tokenized([{"prompt": "Köln is in", "completion": " Germany 🙂.\n"}], tokenizer)
    prompt, answer = split(result)
    assert prompt == tokenizer("Köln is in")["input_ids"]
    assert prompt[0] == tokenizer.bos_token_id
    assert answer[-1] == tokenizer.eos_token_id
    assert tokenizer.decode([*prompt[1:], *answer[:-1]]) == "Köln is in Germany 🙂.\n"
    assert prompt + answer == [*tokenizer("Köln is in Germany 🙂.\n")["input_ids"], tokenizer.eos_token_id]  # as TRL


def test_a_question_and_its_answer_stand_on_lines_of_their_own(tokenizer):
    result = tokenized([{"question": "Where?", "answer": "Here.\nOr there."}], tokenizer)
    prompt, answer = split(result)
    assert tokenizer.decode(prompt[1:]) == "Where?\n"
    assert tokenizer.decode([*prompt[1:], *answer[:-1]]) == "Where?\nHere.\nOr there."
    assert question_prompts(["Where?", "Why?"], tokenizer)[0] == prompt


@given(LINES, LINES, st.sampled_from(["", " ", "\n"]))
def test_the_prompt_is_tokenized_as_it_will_be_when_the_model_is_asked(before, after, between):
    result = tokenized([{"prompt": before + between, "completion": after}], DEMO)
    prompt, answer = split(result)
    assert prompt == DEMO(before + between)["input_ids"]
    assert DEMO.decode(prompt[1:]) == before + between
    assert (DEMO.decode(answer[:-1]), answer[-1]) == (after, DEMO.eos_token_id)


def test_no_token_joins_the_end_of_a_prompt_and_the_start_of_its_completion(tokenizer):
    joined = tokenizer("the lit", add_special_tokens=False)["input_ids"]
    assert tokenizer("the little", add_special_tokens=False)["input_ids"][: len(joined)] != joined
    prompt, answer = split(tokenized([{"prompt": "the lit", "completion": "tle"}], tokenizer))
    assert prompt[1:] == joined
    assert tokenizer.decode([*prompt[1:], *answer[:-1]]) == "the little"  # and not "the lit tle"


def test_all_tokens_of_a_pair_are_trained_when_asked(tokenizer):
    result = tokenized([{"prompt": "a", "completion": ""}], tokenizer, loss_on="all")
    assert result.labels == result.input_ids
    assert result.num_trained == result.num_tokens - 1  # nothing predicts the first


def test_a_text_is_trained_from_its_start_to_its_end_token(tokenizer):
    result = tokenized([{"text": "One.\n\nTwo 🙂."}, {"text": "Three"}], tokenizer)
    assert result.labels == result.input_ids
    for ids, text in zip(result.input_ids, ["One.\n\nTwo 🙂.", "Three"], strict=True):
        assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert tokenizer.decode(ids[1:-1]) == text


@given(st.integers(1, 40), st.integers(2, 12))
def test_windows_predict_every_token_of_a_long_text_once(words, max_length):
    text = " ".join(["water"] * words)
    whole = [*DEMO(text)["input_ids"], DEMO.eos_token_id]
    result = tokenized([{"text": text}, {"text": "x"}], DEMO, max_length=max_length)
    first = [at for at in range(len(result.input_ids)) if result.where(at) == "t.jsonl, line 1"]
    windows = [(result.input_ids[at], result.labels[at]) for at in first]
    predicted = [(ids[at], ids[at + 1]) for ids, labels in windows for at in range(len(ids) - 1) if labels[at + 1] >= 0]
    assert predicted == list(pairwise(whole))
    assert all(len(ids) == max_length for ids, _ in windows[:-1])
    assert 2 <= len(windows[-1][0]) <= max_length
    assert sum(label >= 0 for _, labels in windows for label in labels) == len(whole)
    assert (result.truncated, result.dropped) == (0, 0)


def test_an_end_token_that_the_tokenizer_adds_itself_comes_once():
    tokenizer = shared("minilm-l6")
    assert start_tokens(tokenizer) == [tokenizer.cls_token_id]
    tokenizer.eos_token = "[SEP]"
    (ids,) = tokenized([{"text": "hello"}], tokenizer).input_ids
    assert ids == tokenizer("hello")["input_ids"] == [101, 7592, 102]


def test_a_tokenizer_without_an_end_token_leaves_a_text_open_and_cannot_learn_answers():
    tokenizer = shared("minilm-l6")
    assert tokenized([{"text": "hello world"}], tokenizer).input_ids == [[101, 7592, 2088]]
    with refused(r"the tokenizer has no end-of-sequence token, so the model could not learn where an answer ends; set"):
        tokenized([{"prompt": "a", "completion": "b"}], tokenizer)


def test_the_columns_of_a_dataset_are_what_a_trainer_takes(tokenizer):
    result = tokenized([{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d e"}], tokenizer)
    dataset = result.as_dataset()
    assert dataset.column_names == ["input_ids", "labels"]
    assert (dataset["input_ids"][:], dataset["labels"][:]) == (result.input_ids, result.labels)


@pytest.mark.slow
def test_the_answers_of_gsm8k_are_what_is_trained():
    path = SHARED / "data" / "gsm8k-train.jsonl"
    if not path.exists():
        pytest.skip("../shared/data/gsm8k-train.jsonl is not there")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:500]]
    result = tokenized(rows, DEMO, max_length=2048)
    for index, row in enumerate(rows):
        prompt, answer = split(result, index)
        assert DEMO.decode(prompt[1:]) == row["question"] + "\n"
        assert DEMO.decode(answer) == row["answer"] + "<|eos|>"


def refused(sentence):
    return pytest.raises(ValueError, match=sentence)


def test_bad_options_are_refused():
    with refused(r"max_length 1 is below 2: one token predicts the next"):
        tokenized([{"text": "a"}], DEMO, max_length=1)
    with refused(r"loss_on 'prompts' is neither answers nor all"):
        tokenized([{"text": "a"}], DEMO, loss_on="prompts")


def test_what_has_nothing_to_train_is_refused_by_line():
    with refused(
        r"t\.jsonl: 2 untrained examples: line 2 \(no trained token: no text\), line 3 \(no trained token: no text"
    ):
        tokenized([{"text": "a"}, {"text": ""}, {"text": " \n"}], DEMO)
    with refused(r"t\.jsonl: 1 untrained example: line 2 \(no trained token: the answer is empty\)"):
        tokenized([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "\n"}], DEMO)


def test_pairs_without_any_prompt_are_refused_because_all_would_be_trained():
    tokenizer = shared("minilm-l6")
    tokenizer.eos_token = "[SEP]"
    tokenizer.backend_tokenizer.post_processor = None
    with refused(r"t\.jsonl: 4 of 4 tokens would be trained \(100 %\).*or train on all tokens \(--loss-on all\)"):
        tokenized([{"prompt": "", "completion": "hello"}] * 2, tokenizer)


def test_a_text_that_has_its_start_and_end_tokens_gets_no_second_ones(tokenizer):
    start, end = tokenizer.bos_token, tokenizer.eos_token
    marked, bare = (
        tokenized(rows, tokenizer)
        for rows in (
            [{"text": f"{start}Köln{end}"}, {"text": f"{start}Köln"}, {"text": f" Köln{end}"}],
            [{"text": "Köln"}] * 3,
        )
    )
    for ids in (*marked.input_ids, *bare.input_ids):
        assert (ids.count(tokenizer.bos_token_id), ids.count(tokenizer.eos_token_id)) == (1, 1)
        assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    (ids, labels) = split(tokenized([{"prompt": f"{start}Köln is", "completion": f" here{end}"}], tokenizer))
    assert (ids.count(tokenizer.bos_token_id), labels.count(tokenizer.eos_token_id)) == (1, 1)
