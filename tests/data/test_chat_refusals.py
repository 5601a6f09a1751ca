"""Conversations and templates that cannot be trained on, each refused by name, place and way out."""

import pytest

from tests.data.templates import CHATML, DOUBLE, LLAMA3, MARKS, NO_END, SINGLE, STRIPS_EARLIER, demo, tokenized


@pytest.fixture(params=[CHATML, LLAMA3])
def tokenizer(request):
    return demo(request.param, MARKS)


def refused(sentence):
    return pytest.raises(ValueError, match=sentence)


def test_a_template_that_drops_the_end_of_a_turn_is_refused():
    rows = [{"messages": SINGLE}]
    for loss_on in ("answers", "all"):
        with refused(
            r"drops the end of a turn: the assistant's text in t\.jsonl, line 1 ends with '\.', which is not an end"
        ):
            tokenized(rows, demo(NO_END, MARKS), loss_on=loss_on)
    with refused(r"ends with '>'.*make the mark there a special token of the tokenizer"):
        tokenized(rows, demo(CHATML))  # its marks are text to this tokenizer
    tokenizer = demo(CHATML)
    end = tokenizer.encode(">", add_special_tokens=False)
    assert tokenized(rows, tokenizer, stop_ids=end).num_trained > 0


def test_a_template_that_rewrites_earlier_turns_is_refused_by_line():
    tokenizer = demo(STRIPS_EARLIER, MARKS)
    thinks = [SINGLE[0], {"role": "assistant", "content": "hm</think>Yes"}]
    assert tokenized([{"messages": thinks}], tokenizer).num_trained > 2
    with refused(
        r"t\.jsonl: 1 unusable example: line 2 \(the assistant's text in message 2 cannot be located: .*generation"
    ):
        tokenized([{"messages": thinks}, {"messages": [*thinks, *SINGLE]}], tokenizer)
    marked = STRIPS_EARLIER.replace("<|im_end|>", "{% generation %}{% endgeneration %}<|im_end|>")
    with refused(r"line 1 \(the chat template changes the prompt when a completion follows it\)"):
        tokenized([{"prompt": thinks, "completion": SINGLE}], demo(marked, MARKS))


def test_an_example_without_a_trained_token_is_refused_by_line(tokenizer):
    silent, blank = [SINGLE[0]], [SINGLE[0], {"role": "assistant", "content": " \n"}]
    rows = [{"messages": SINGLE}, {"messages": silent}, {"messages": blank}]
    with refused(r"t\.jsonl: 2 untrained examples: line 2 \(no trained token: the assistant says nothing\), line 3"):
        tokenized(rows, tokenizer)
    with refused(r"1 untrained example: line 1 \(no trained token: the assistant says nothing\)"):
        tokenized([{"question": "a", "answer": " "}], tokenizer)
    with refused(r"1 untrained example: line 1 \(no trained token: the assistant says nothing\)"):
        tokenized([{"prompt": DOUBLE[:3], "completion": DOUBLE[3:4]}], tokenizer)


def test_a_template_that_leaves_answers_out_is_refused():
    no_content = (
        "{% for m in messages %}<|im_start|>{{ m.content if m.role == 'user' }}"
        "{% generation %}<|im_end|>{% endgeneration %}{% endfor %}"
    )
    with refused(r"line 1 \(no trained token: the chat template leaves out what the assistant says\)"):
        tokenized([{"messages": SINGLE}], demo(no_content, MARKS))


def test_a_template_that_leaves_out_what_the_user_or_the_system_says_is_refused():
    no_system = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    assert no_system != CHATML
    rows = [{"messages": SINGLE}, {"messages": [{"role": "system", "content": " Be brief.\n"}, *SINGLE]}]
    with refused(
        r"1 unusable example: line 2 \(the chat template leaves out what message 1 \(system\) says, 'Be brief"
    ):
        tokenized(rows, demo(no_system, MARKS))


def test_a_template_that_marks_everything_is_refused():
    everything = "{% generation %}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}{% endgeneration %}"
    with refused(r"t\.jsonl: (\d+) of \1 tokens would be trained \(100 %\), so answers cannot be told from"):
        tokenized([{"messages": SINGLE}], demo(everything, MARKS))


def test_what_the_template_refuses_is_named():
    strict = "{{ raise_exception('No system role') if messages[0].role == 'system' }}" + CHATML
    with refused(r"1 unusable example: line 2 \(the chat template cannot render it: No system role\)"):
        tokenized([{"messages": SINGLE}, {"messages": DOUBLE}], demo(strict, MARKS))
    for wild, said in (
        ("{{ range(10**9) | list }}", r"cannot render it: Range too big"),
        ("{{ 1 // 0 }}", r"cannot render it: (integer )?division"),
        ("{{ 'x' * 10**8 }}", r"makes 100,000,\d+ characters of it; at most 10,000,000 are read"),
    ):
        with refused(rf"line 1 \(the chat template {said}"):
            tokenized([{"messages": SINGLE}], demo(CHATML + wild, MARKS))
    with refused(r"line 1 \(the first message is the assistant's, so the start of its turn cannot be found\)"):
        tokenized([{"messages": SINGLE[1:]}], demo(CHATML, MARKS))


def test_messages_need_a_chat_template():
    for row in ({"messages": SINGLE}, {"prompt": SINGLE[:1], "completion": SINGLE[1:]}):
        with refused(r"t\.jsonl holds messages, but the tokenizer has no chat template: give qsvd train --chat"):
            tokenized([row], demo())


def test_a_length_that_leaves_no_answer_at_all_is_refused(tokenizer):
    long = [{"role": "user", "content": "word " * 50}, SINGLE[1]]
    with refused(
        r"t\.jsonl: no example has a trained token within max_length 4; the shortest has \d+ tokens; raise --max-length"
    ):
        tokenized([{"messages": SINGLE}, {"messages": long}], tokenizer, max_length=4)
