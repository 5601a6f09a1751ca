"""Which columns are what, and what is refused with its line."""

import re

import pytest

from qsvd.data.columns import COLUMN_SETS, recognise
from qsvd.data.row_files import Places, Rows

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]


def rows_of(*rows):
    return Rows(list(rows), Places("t.jsonl", "line", [2 * number + 1 for number in range(len(rows))]))


def recognised(*rows, **mapping):
    return recognise(rows_of(*rows), mapping)


def refused(sentence):
    return pytest.raises(ValueError, match=sentence)


@pytest.mark.parametrize(
    ("row", "kind", "literal", "example"),
    [
        ({"messages": HI}, "chat", True, {"messages": HI, "tools": None}),
        ({"messages": HI, "tools": TOOLS, "prompt": "a"}, "chat", True, {"messages": HI, "tools": TOOLS}),
        ({"messages": HI, "tools": '[{"a": 1}]'}, "chat", True, {"messages": HI, "tools": [{"a": 1}]}),
        ({"conversations": HI, "tools": []}, "chat", True, {"messages": HI, "tools": None}),
        ({"prompt": "a", "completion": "b"}, "pair", True, {"prompt": "a", "completion": "b", "tools": None}),
        (
            {"prompt": HI[:1], "completion": HI[1:], "text": "c"},
            "pair",
            True,
            {"prompt": HI[:1], "completion": HI[1:], "tools": None},
        ),
        ({"question": "a", "answer": "b", "id": 3}, "pair", False, {"prompt": "a", "completion": "b", "tools": None}),
        (
            {"instruction": "a", "input": "c", "output": "b", "text": "abc"},
            "pair",
            False,
            {"prompt": "a\n\nc", "completion": "b", "tools": None},
        ),
        (
            {"instruction": "a", "input": " ", "output": "b"},
            "pair",
            False,
            {"prompt": "a", "completion": "b", "tools": None},
        ),
        ({"instruction": "a", "output": "b"}, "pair", False, {"prompt": "a", "completion": "b", "tools": None}),
        ({"text": "a", "label": 1}, "labelled", True, {"text": "a", "text_pair": None, "label": 1}),
        (
            {"text": "a", "label": "x", "text_pair": "b"},
            "labelled",
            True,
            {"text": "a", "text_pair": "b", "label": "x"},
        ),
        ({"text": "a", "label": None}, "text", True, {"text": "a"}),
    ],
)
def test_the_most_specific_set_of_columns_is_taken(row, kind, literal, example):
    found = recognised(row)
    assert (found.kind, found.literal, found.rows) == (kind, literal, [example])
    assert found.where(0) == "t.jsonl, line 1"


def test_speakers_become_roles():
    speakers = ["system", "human", "gpt", "user", "assistant", "tool", "function", "observation"]
    turns = [{"from": speaker, "value": speaker} for speaker in speakers]
    messages = recognised({"conversations": turns}).rows[0]["messages"]
    roles = ["system", "user", "assistant", "user", "assistant", "tool", "tool", "tool"]
    assert messages == [{"role": role, "content": speaker} for role, speaker in zip(roles, speakers, strict=True)]


def test_null_fields_of_a_table_are_left_out():
    called = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    messages = recognised({"messages": [HI[0] | {"tool_calls": None}, called]}).rows[0]["messages"]
    assert messages == [HI[0], {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]


def test_mapped_columns_choose_the_set_and_take_the_place_of_others():
    row = {"messages": HI, "text": "a", "body": "b", "response": "c", "context": "d", "instruction": "e"}
    assert recognised(row, body="text").rows == [{"text": "b"}]
    pair = {"prompt": "e\n\nd", "completion": "c", "tools": None}
    assert recognised(row, response="output", context="input").rows == [pair]
    swapped = recognised({"prompt": "a", "completion": "b"}, prompt="completion", completion="prompt")
    assert swapped.rows == [{"prompt": "b", "completion": "a", "tools": None}]


def test_a_row_without_the_mapped_column_does_not_fall_back_on_another():
    with refused(r"read as text: 1 broken example: line 3 \(no text\)"):
        recognised({"text": "a", "body": "b"}, {"text": "a", "body": None}, body="text")


def test_a_wrong_mapping_is_refused():
    with refused(r"--map: t\.jsonl has no column z; it has a, b$"):
        recognised({"a": "x", "b": "y"}, z="text")
    with refused(
        r"--map: txt is not a name of qsvd; "
        r"the names are messages, tools, images, image, conversations, audio, text, prompt"
    ):
        recognised({"a": "x", "b": "y"}, a="txt")
    with refused(r"--map: several columns are mapped to text; map one"):
        recognised({"a": "x", "b": "y"}, a="text", b="text")
    with refused(r"has the columns a, b \(with --map a=text b=answer\), which do not make an example"):
        recognised({"a": "x", "b": "y"}, a="text", b="answer")


def test_columns_that_are_no_example_are_answered_with_all_that_are():
    with refused(
        r"t\.jsonl has the columns a, question, which do not make an example\. Accepted columns, \[\] being optional: "
    ) as error:
        recognised({"a": "x", "question": "y"})
    assert re.search(
        r"messages \+ \[tools\]; .*; text \+ label \+ \[text_pair\]; text; .*\. Rename columns", str(error.value)
    )
    assert all(str(known) in str(error.value) for known in COLUMN_SETS)
    with refused(r"has the columns \(none\), which"):
        recognised({})


def test_all_rows_without_a_column_are_counted_and_five_shown():
    good, bad = {"question": "a", "answer": "b"}, {"question": "a", "answer": None}
    with refused(
        r"t\.jsonl, read as question \+ answer: 6 broken examples: "
        r"line 3 \(no answer\), line 5 \(no question and no answer\), "
        r"line 7 \(no answer\), line 9 \(no answer\), line 11 \(no answer\) and 1 more$"
    ):
        recognised(good, bad, {}, *[bad] * 4)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"messages": "a"}, r"line 1 \(messages is str 'a', not a list of messages\)"),
        ({"messages": []}, r"messages is list \[\], not a list of messages"),
        ({"messages": ["a"]}, r"messages\[0\] is str 'a', not an object with role and content"),
        ({"messages": [*HI, {"content": "a"}]}, r"messages\[2\] has no role"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] has no content"),
        ({"messages": HI, "tools": "[x"}, r"tools is a text, but not JSON \(Expecting"),
        ({"messages": HI, "tools": ["a"]}, r"tools is list \['a'\], not a list of JSON schemas"),
        ({"conversations": "a"}, r"conversations is str 'a', not a list of turns"),
        ({"conversations": [{"from": "gpt"}]}, r"conversations\[0\] is dict .*, not an object with from and value"),
        (
            {"conversations": [{"from": "bot", "value": "a"}]},
            r"is from 'bot'; known are human, user, gpt, assis.*vation\)",
        ),
        ({"prompt": "a", "completion": 3}, r"completion is int 3, not a text"),
        ({"prompt": HI[:1], "completion": "b"}, r"completion is str 'b', not a list of messages"),
        ({"text": "a", "label": 0.5}, r"label is float 0\.5, not a name or an integer"),
        ({"text": "a", "label": True}, r"label is bool True, not a name or an integer"),
        ({"text": ["a" * 100]}, r"text is list \['a{35}\.\.\., not a text"),
    ],
)
def test_another_value_than_a_column_holds_is_refused_with_its_line(row, sentence):
    with refused(sentence):
        recognised(row)


def test_text_and_messages_do_not_mix_in_one_file():
    pairs = [{"prompt": "a", "completion": "b"}, {"prompt": HI[:1], "completion": HI[1:]}]
    with refused(r"line 3 \(prompt is list .*, but in the rows before it is a str\)"):
        recognised(*pairs)
