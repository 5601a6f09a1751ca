"""The number that an answer ends in, by a table, by drawn spellings, and as GSM8K's authors read it."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsvd.evaluate.exact_match import final_number
from tests.evaluate.tiny import shared


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *(("#### 72", "72"), ("3 + 4 = 7", "7"), ("1,000.00", "1000"), ("$1,000.50", "1000.5"), ("It is 72.", "72")),
        *(("-$5", "-5"), ("$-5", "-5"), ("x = -5", "-5"), ("\u22127", "-7"), ("+5", "5"), ("-0.0", "0"), ("007", "7")),
        *(("10-5", "5"), ("(a)-5", "5"), ("pages 3-4", "4"), ("50%-20", "20"), ("x[1]-2", "2"), ("9.-3", "3")),
        *(("1,2,3", "3"), ("12,34", "34"), ("1,0000", "0"), ("1234,567", "567"), ("1,234,567", "1234567")),
        *((".50", "0.5"), ("$.50", "0.5"), ("total.72", "72"), ("$ 12", "12"), ("20%", "20"), ("100", "100")),
        *(("1 #### 2 3\n4", "2"), ("#### 5 #### 6", "6"), ("#### $1,080 dollars", "1080"), ("####72", "72")),
        *(
            ("12,3456", "3456"),
            ("-$ 5", "-5"),
            ("", None),
            ("none", None),
            ("7 #### ", None),
            ("7 #### \n8", None),
            ("1.5.2", "2"),
            ("0.00", "0"),
        ),
        ("1234567890123456789012345678901234567890.10", "1234567890123456789012345678901234567890.1"),
    ],
)
def test_the_final_number_has_one_spelling(text, number):
    assert final_number(text) == number


@given(st.integers(-(10**40), 10**40), st.integers(0, 3), st.sampled_from(["{}", "it is {}.", "4\n#### {}", "={} cm"]))
def test_any_spelling_of_an_integer_is_that_integer(number, zeros, sentence):
    for spelling in (f"{number}", f"{number:,}", f"{number:,}.{'0' * zeros}", f"{number}.{'0' * zeros}"):
        assert final_number(sentence.format(spelling)) == str(number)


def test_the_answers_of_gsm8k_are_read_as_its_authors_read_them():
    with shared("data/gsm8k-train.jsonl").open(encoding="utf-8") as lines:  # splitlines() would cut at a U+2028 in it
        answers = [json.loads(line)["answer"] for line in lines]
    theirs = re.compile(r"#### (\-?[0-9\.\,]+)")  # grade_school_math/dataset.py, ANS_RE
    expected = [theirs.search(answer)[1].replace(",", "") for answer in answers]
    assert [final_number(answer) for answer in answers] == expected
    assert len(expected) == 7473
