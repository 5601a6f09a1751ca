"""What a user is shown before training."""

import pytest

from qsvd.data.columns import recognise
from qsvd.data.masks import preview
from qsvd.data.row_files import Places, Rows
from qsvd.data.tokens import tokenize
from tests.data.templates import CHATML_MARKED, MARKS, demo, shared

ROWS = [
    {"messages": [{"role": "user", "content": "Hé?"}, {"role": "assistant", "content": "Ja 🙂"}]},
    {"messages": [{"role": "user", "content": "No"}, {"role": "assistant", "content": "[bold]"}] * 2},
]


def tokenized(rows, tokenizer):
    return tokenize(recognise(Rows(rows, Places("t.jsonl", "line", [3, 5])), {}), tokenizer, max_length=64)


def test_trained_tokens_stand_in_brackets_and_in_colour():
    tokenizer = demo(CHATML_MARKED, MARKS)
    result = tokenized(ROWS, tokenizer)
    shown = preview(result, tokenizer)
    num_tokens = len(tokenizer.apply_chat_template(ROWS[0]["messages"])["input_ids"])
    num_trained = len(tokenizer("Ja 🙂<|im_end|>", add_special_tokens=False)["input_ids"])
    assert shown.plain == (
        f"t.jsonl, line 3: {num_tokens} tokens, {num_trained} trained ({num_trained / num_tokens:.0%})\n"
        "<|im_start|>user\nHé?<|im_end|>\n<|im_start|>assistant\n[[Ja 🙂<|im_end|>]]"
    )
    assert [shown.plain[span.start : span.end] for span in shown.spans] == ["[[Ja 🙂<|im_end|>]]"]
    second = preview(result, tokenizer, 1)
    assert second.plain.count("[[[bold]<|im_end|>]]") == len(second.spans) == 2


def test_spaces_at_the_edges_stay():
    tokenizer = shared("stories260K")
    result = tokenized([{"prompt": "Once", "completion": " upon a time"}], tokenizer)
    assert preview(result, tokenizer).plain.splitlines()[1] == "<s> Once[[ upon a time</s>]]"


def test_a_labelled_text_is_shown_with_its_class():
    tokenizer = demo()
    rows = [{"text": "good", "label": "pos"}, {"text": "bad", "label": "neg"}]
    assert preview(tokenized(rows, tokenizer), tokenizer, 1).plain.endswith("tokens, label 0 (neg)\n<|bos|>bad")


def test_an_example_that_is_not_there_is_refused():
    tokenizer = demo()
    with pytest.raises(ValueError, match=r"example 1 is outside 0\.\.0, the sequences of t\.jsonl$"):
        preview(tokenized([{"text": "a"}], tokenizer), tokenizer, 1)


def test_signs_that_steer_a_terminal_are_shown_as_escapes():
    tokenizer = demo(CHATML_MARKED, MARKS)
    rows = [{"messages": [{"role": "user", "content": "a\x1b[2J"}, {"role": "assistant", "content": "b\r\x07"}]}]
    shown = preview(tokenized(rows, tokenizer), tokenizer).plain
    assert shown.endswith("<|im_start|>user\na\\x1b[2J<|im_end|>\n<|im_start|>assistant\n[[b\\r\\x07<|im_end|>]]")
