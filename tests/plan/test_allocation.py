"""The table of choices: written, read, edited by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsvd.numerics.names import codec_named, spelling
from qsvd.plan.allocation import Allocation, Choice, from_text, stored_bytes, to_text
from tests.plan.weights import specs

WEIGHTS = specs()
NAMES = ("nf2-16-2x64", "nf3-64-8x256", "nf4-64-fp16", "nf8-128-bf16", "nf4-64-8x256")


@st.composite
def allocations(draw):
    choices = {
        spec.module: Choice(codec_named(draw(st.sampled_from(NAMES))), draw(st.integers(0, min(spec.shape))))
        for spec in WEIGHTS
    }
    errors = draw(st.sampled_from(({}, {spec.module: 0.125 for spec in WEIGHTS})))
    return Allocation(choices, errors, ("model: a model", "budget: 2.75bits"))


@given(allocations())
def test_what_is_written_is_read(allocation):
    text = to_text(allocation, WEIGHTS)
    found = from_text(text, WEIGHTS, "FILE")
    assert found.choices == allocation.choices
    assert list(found.choices) == [spec.module for spec in WEIGHTS]
    assert found.remarks == allocation.remarks
    assert found.errors == {}
    assert to_text(Allocation(found.choices, allocation.errors, found.remarks), WEIGHTS) == text


@given(allocations())
def test_the_bytes_are_those_of_codes_scales_and_factors(allocation):
    by_hand = 0
    for spec in WEIGHTS:
        choice, numbers = allocation.choices[spec.module], math.prod(spec.shape)
        _, block, scales = spelling(choice.codec).split("-")
        num_blocks = math.ceil(numbers / int(block))
        if "x" in scales:
            bits, group = map(int, scales.split("x"))
            num_scales = (
                math.ceil(num_blocks * bits / 8) + 4 * math.ceil(num_blocks / group) + 4
            )  # codes, absmax, offset
        else:
            num_scales = 2 * num_blocks
        by_hand += numbers * choice.codec.bits // 8 + num_scales + 2 * choice.rank * sum(spec.shape)
    assert stored_bytes(allocation, WEIGHTS) == by_hand


def table(changed):
    """A whole table with some lines replaced: by the number of the weight, None for none."""
    lines = [f"{spec.module}  nf3-64-8x256  4  3.1  0.2" for spec in WEIGHTS]
    for number, line in changed.items():
        lines[number] = line
    return "\n".join(["# qsvd allocation", *(line for line in lines if line is not None)])


def test_an_edited_table_needs_three_columns_and_no_heading():
    found = from_text(table({1: "layers.0.k_proj nf2-16-2x64 0\r"}), WEIGHTS, "FILE")
    assert found.choices["layers.0.k_proj"] == Choice(codec_named("nf2-16-2x64"), 0)
    assert found.choices["layers.1.q_proj"] == Choice(codec_named("nf3-64-8x256"), 4)


WRONG = {  # a line in place of another, by its number, and what is said of it
    "an unknown weight": (0, "layers.9.q_proj nf3-64-8x256 4", "line 2: layers.9.q_proj is not a weight to split"),
    "a missing line": (0, None, "1 weights have no line: layers.0.q_proj"),
    "a double line": (1, "layers.0.q_proj nf3-64-8x256 4", "line 3: layers.0.q_proj has a line already"),
    "an unknown codec": (
        2,
        "layers.0.down_proj nf5-64-8x256 4",
        "line 4: codec 'nf5-64-8x256': codes have 2, 3, 4",
    ),
    "no codec at all": (2, "layers.0.down_proj int4 4", "line 4: codec 'int4' is unknown; a codec is nf4 or nf4+dq"),
    "a rank too high": (
        1,
        "layers.0.k_proj nf3-64-8x256 17",
        "line 3: rank 17 is outside 0..16, the ranks of",
    ),
    "a negative rank": (1, "layers.0.k_proj nf3-64-8x256 -1", "line 3: rank -1 is outside 0..16"),
    "a broken rank": (1, "layers.0.k_proj nf3-64-8x256 4.5", "line 3: rank 4.5 is outside 0..16"),
    "too few columns": (1, "layers.0.k_proj nf3-64-8x256", "line 3: the line needs a weight, a codec and a rank"),
    "bitsandbytes beside others": (0, "layers.0.q_proj nf4 4", "nf4 (bitsandbytes) cannot be mixed"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_does_not_fit_is_named_by_its_line(kind):
    number, line, sentence = WRONG[kind]
    with pytest.raises(ValueError, match=r"^FILE cannot be used: ") as refused:
        from_text(table({number: line}), WEIGHTS, "FILE")
    assert sentence in str(refused.value)


def test_one_message_has_all_problems():
    text = table({0: None, 1: "layers.0.k_proj nf3-64-8x256 99", 2: "layers.0.down_proj nf9-64-fp16 0"})
    with pytest.raises(
        ValueError, match=r"rank 99 .*; line 3: codec 'nf9-64-fp16'.*; 1 weights have no line"
    ) as refused:
        from_text(text, WEIGHTS, "FILE")
    assert "k_proj have no line" not in str(refused.value)  # it has one, though a wrong one


def test_the_two_codecs_of_bitsandbytes_do_not_mix_and_either_can_be_alone():
    lines = [f"{spec.module} nf4+dq 4" for spec in WEIGHTS]
    assert from_text("\n".join(lines), WEIGHTS, "FILE").layout == "bitsandbytes"
    lines[0] = f"{WEIGHTS[0].module} nf4 4"
    with pytest.raises(ValueError, match=r"nf4 and nf4\+dq \(bitsandbytes\) cannot be mixed"):
        from_text("\n".join(lines), WEIGHTS, "FILE")


def test_another_text_is_no_table():
    with pytest.raises(ValueError, match="line 1: Once is not a weight to split"):
        from_text("Once upon a time", WEIGHTS, "FILE")
