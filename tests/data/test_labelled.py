"""Labelled texts against the tokenizer called by itself."""

import json

import pytest

from qsvd.data.columns import recognise
from qsvd.data.row_files import Places, Rows
from qsvd.data.tokens import tokenize
from tests.data.templates import SHARED, demo, shared


def examples(*rows):
    return recognise(Rows(list(rows), Places("t.csv", "line", range(2, len(rows) + 2))), {})


def labelled(*labels):
    return examples(*({"text": f"text {label}", "label": label} for label in labels))


@pytest.fixture(scope="module")
def minilm():
    return shared("minilm-l6")


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        (["pos", "neg", "pos"], ("neg", "pos"), [1, 0, 1]),
        ([1, 0, 2, 1], ("0", "1", "2"), [1, 0, 2, 1]),
        ([str(number) for number in range(11)], tuple(str(number) for number in range(11)), list(range(11))),
        (["007", "+7"], ("+7", "007"), [1, 0]),
    ],
)
def test_classes_are_sorted_names_or_the_integers(minilm, labels, names, numbers):
    result = tokenize(labelled(*labels), minilm, max_length=16)
    assert (result.kind, result.label_names, result.labels) == ("labelled", names, numbers)
    assert result.input_ids == [minilm(f"text {label}")["input_ids"] for label in labels]
    assert (result.num_trained, result.token_types) == (len(labels), None)


def test_the_classes_of_the_training_rows_number_those_of_others(minilm):
    assert tokenize(labelled("c", "c"), minilm, max_length=16, label_names=("a", "b", "c")).labels == [2, 2]
    with refused(r"t\.csv: 1 unknown label: line 3 \('d'\); known labels are a, b, c$"):
        tokenize(labelled("c", "d"), minilm, max_length=16, label_names=("a", "b", "c"))


def test_long_texts_are_cut_and_counted(minilm):
    rows = [{"text": "one two three four", "label": 0}, {"text": "one", "label": 1}]
    result = tokenize(examples(*rows), minilm, max_length=5)
    assert result.input_ids == [minilm("one two three")["input_ids"], minilm("one")["input_ids"]]
    assert (result.truncated, result.dropped) == (1, 0)


def test_the_second_text_of_a_pair_has_a_type_of_its_own(minilm):
    rows = [{"text": "one two", "text_pair": "three", "label": 0}, {"text": "one", "text_pair": "two", "label": 1}]
    result = tokenize(examples(*rows), minilm, max_length=16)
    theirs = [minilm(row["text"], row["text_pair"]) for row in rows]
    assert result.input_ids == [one["input_ids"] for one in theirs]
    assert result.as_dataset()["token_type_ids"][:] == [one["token_type_ids"] for one in theirs]
    assert [sum(types) for types in result.token_types] == [2, 2]


def test_a_dataset_has_one_integer_for_each_text(minilm):
    dataset = tokenize(labelled("b", "a"), minilm, max_length=16).as_dataset()
    assert (dataset.column_names, dataset["labels"][:]) == (["input_ids", "labels"], [1, 0])


def test_a_language_models_tokenizer_adds_what_it_adds():
    tokenizer = demo()
    result = tokenize(labelled("b", "a"), tokenizer, max_length=16)
    assert result.input_ids == tokenizer(["text b", "text a"])["input_ids"]


@pytest.mark.slow
def test_sst2_has_its_two_classes(minilm):
    path = SHARED / "data" / "sst2-dev.jsonl"
    if not path.exists():
        pytest.skip("../shared/data/sst2-dev.jsonl is not there")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:2500]]
    result = tokenize(examples(*rows), minilm, max_length=128)
    assert result.labels == [row["label"] for row in rows]
    assert result.input_ids[2400] == minilm(rows[2400]["text"])["input_ids"]


def refused(sentence):
    return pytest.raises(ValueError, match=sentence)


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        (["a", "a"], r"t\.csv has only one class, 'a'; a classifier needs two or more"),
        (
            [0, "pos", 1],
            r"has integers and names as labels: . in line [24], 'pos' in line 3; write all of them in the same way",
        ),
        (
            [10, 2],
            r"has 2 classes, so integer labels must be 0\.\.1, but there is 2 in line 3, 10 in line 2; number",
        ),
        ([0, -1, 1], r"has 3 classes, so integer labels must be 0\.\.2, but there is -1 in line 3; number"),
    ],
)
def test_labels_that_are_no_classes_are_refused(minilm, labels, sentence):
    with refused(sentence):
        tokenize(labelled(*labels), minilm, max_length=16)


def test_a_length_without_room_for_text_is_refused(minilm):
    with refused(r"max_length 2 is not above 2, the special tokens that the tokenizer adds to a text"):
        tokenize(labelled("a", "b"), minilm, max_length=2)
