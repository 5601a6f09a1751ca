"""Masks of conversations: by decoding what is trained, by transformers' mask, and by what TRL's trainer prepares."""

import warnings
from pathlib import Path

import datasets
import pytest
import trl
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from qsvd.data.columns import UNTRAINED
from qsvd.data.tokens import question_prompts
from tests.data.templates import CHATML, CHATML_MARKED, DEMO, DOUBLE, LLAMA3, MARKS, SINGLE, demo, shared, tokenized

TRL_TEMPLATES = Path(trl.__file__).parent / "chat_templates"
DEEPSEEK_END = "<\uff5cend\u2581of\u2581sentence\uff5c>"  # with wide bars
TEMPLATES = {"chatml": CHATML, "marked": CHATML_MARKED, "llama3": LLAMA3}
READY = {name: demo(template, MARKS) for name, template in TEMPLATES.items()}


def trained_pieces(ids, labels, tokenizer):
    """What is trained, decoded run by run."""
    runs, run = [], []
    for token, label in zip([*ids, 0], [*labels, UNTRAINED], strict=True):
        assert label in (token, UNTRAINED)
        if label != UNTRAINED:
            run.append(token)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return runs


def test_a_template_that_reads_parts_alone_as_those_of_image_models_gets_texts_as_parts():
    text = "{% for part in m.content if part.type == 'text' %}{{ part.text }}{% endfor %}"
    for template in (CHATML, CHATML_MARKED):
        tokenizer = demo(template.replace("{{ m.content }}", text), MARKS)
        ours, plain = (tokenized([{"messages": DOUBLE}], one) for one in (tokenizer, demo(template, MARKS)))
        assert (ours.input_ids, ours.labels) == (plain.input_ids, plain.labels)
        assert tokenizer.apply_chat_template(SINGLE, tokenize=False).count("Zoë") == 0, "transformers leaves it out"


@pytest.fixture(params=TEMPLATES)
def tokenizer(request):
    return demo(TEMPLATES[request.param], MARKS)


def end_of(tokenizer):
    return {CHATML: "<|im_end|>\n", CHATML_MARKED: "<|im_end|>", LLAMA3: "<|eot_id|>"}[tokenizer.chat_template]


def test_the_assistants_turns_are_trained_with_their_ends_and_nothing_else(tokenizer):
    result = tokenized([{"messages": SINGLE}, {"messages": DOUBLE}], tokenizer)
    end = end_of(tokenizer)
    pieces = [trained_pieces(*pair, tokenizer) for pair in zip(result.input_ids, result.labels, strict=True)]
    assert pieces == [[f"In Köln 🙂.{end}"], [f"In Köln 🙂.{end}", f"Yes.\n\nVery.{end}"]]
    for ids, messages in zip(result.input_ids, (SINGLE, DOUBLE), strict=True):
        assert ids == tokenizer.apply_chat_template(messages)["input_ids"]
    assert result.num_trained == sum(label != UNTRAINED for labels in result.labels for label in labels)
    assert (result.kind, result.truncated, result.dropped, result.where(1)) == ("chat", 0, 0, "t.jsonl, line 2")


WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12).map(lambda t: f"a{t}b")


@settings(max_examples=30)
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4), st.sampled_from(sorted(TEMPLATES)))
def test_any_answers_are_what_is_trained(exchanges, name):
    tokenizer = READY[name]
    messages = [
        {"role": role, "content": text}
        for both in exchanges
        for role, text in zip(("user", "assistant"), both, strict=True)
    ]
    result = tokenized([{"messages": messages}], tokenizer)
    pieces = trained_pieces(result.input_ids[0], result.labels[0], tokenizer)
    assert pieces == [answer + end_of(tokenizer) for _, answer in exchanges]


def test_a_sentencepiece_tokenizer_has_the_same_turns():
    tokenizer = shared("stories260K")
    tokenizer.add_special_tokens({"extra_special_tokens": MARKS})
    tokenizer.chat_template = LLAMA3
    result = tokenized([{"messages": DOUBLE}], tokenizer)
    (first, second) = trained_pieces(result.input_ids[0], result.labels[0], tokenizer)
    assert (first.strip(), second.strip()) == ("In Köln 🙂.<|eot_id|>", "Yes.\n\nVery.<|eot_id|>")
    assert result.input_ids[0] == tokenizer.apply_chat_template(DOUBLE)["input_ids"]


@pytest.mark.parametrize("name", ["llama3", "qwen2_5", "qwen3", "phi3", "gptoss", "cohere2", "deepseekv3", "gemma"])
def test_templates_that_trl_knows_are_marked_as_trl_marks_them(name):
    plain, training = (TRL_TEMPLATES / f"{stem}.jinja" for stem in (name, f"{name}_training"))
    ends = ["<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<end_of_turn>"]
    tokenizer = demo(plain.read_text(), [*ends, "<|END_OF_TURN_TOKEN|>", DEEPSEEK_END])
    messages = [message for message in DOUBLE[1:-1] if message["role"] != "system"]
    result = tokenized([{"messages": messages}], tokenizer, max_length=2048)
    theirs = tokenizer.apply_chat_template(
        messages,
        chat_template=training.read_text(),
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"verbose": False},
    )
    assert result.input_ids == [theirs["input_ids"]]
    assert [label != UNTRAINED for label in result.labels[0]] == [bool(mask) for mask in theirs["assistant_masks"]]


@pytest.mark.slow
@pytest.mark.parametrize("template", [CHATML_MARKED, "llama3"])
def test_trls_trainer_prepares_the_same_tokens_and_labels(template, tmp_path):
    known = (TRL_TEMPLATES / "llama3.jinja").read_text()
    tokenizer = demo(known if template == "llama3" else template, MARKS)
    rows = [{"messages": SINGLE}, {"messages": DOUBLE}]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of TRL
        config = trl.SFTConfig(str(tmp_path), assistant_only_loss=True, max_length=24, use_cpu=True, bf16=False)
        theirs = trl.SFTTrainer(
            AutoModelForCausalLM.from_pretrained(DEMO),
            config,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
        ).train_dataset
    ours = tokenized(rows, tokenizer, max_length=24).as_dataset()
    assert ours["input_ids"][:] == theirs["input_ids"][:]
    assert ours["labels"][:] == theirs["labels"][:]


def test_a_question_goes_through_the_template_and_a_literal_prompt_does_not(tokenizer):
    question = tokenized([{"question": "Where is Zoë?", "answer": "In Köln 🙂."}], tokenizer)
    chat = tokenized([{"messages": SINGLE}], tokenizer)
    assert (question.input_ids, question.labels) == (chat.input_ids, chat.labels)
    literal = tokenized([{"prompt": "Where is Zoë?", "completion": "In Köln 🙂."}], tokenizer)
    assert tokenizer.decode(literal.input_ids[0]) == "<|bos|>Where is Zoë?In Köln 🙂.<|eos|>"


def test_a_question_prompt_is_what_training_puts_before_the_answer(tokenizer):
    (prompt,) = question_prompts(["Where is Zoë?"], tokenizer)
    result = tokenized([{"question": "Where is Zoë?", "answer": "In Köln 🙂."}], tokenizer)
    assert result.input_ids[0][: len(prompt)] == prompt
    trained = [label != UNTRAINED for label in result.labels[0]]
    assert trained.index(True) == len(prompt)
    asked = tokenizer.apply_chat_template(SINGLE[:1], add_generation_prompt=True)["input_ids"]
    assert prompt == asked


def test_only_the_completion_of_a_pair_of_messages_is_trained(tokenizer):
    pair = {"prompt": DOUBLE[:4], "completion": DOUBLE[4:]}
    result = tokenized([pair], tokenizer)
    assert result.input_ids == tokenized([{"messages": DOUBLE}], tokenizer).input_ids
    assert trained_pieces(result.input_ids[0], result.labels[0], tokenizer) == [f"Yes.\n\nVery.{end_of(tokenizer)}"]


def test_all_tokens_are_trained_when_asked(tokenizer):
    result = tokenized([{"messages": DOUBLE}, {"messages": SINGLE}], tokenizer, loss_on="all")
    assert result.labels == result.input_ids
    open_ended = demo("{% for m in messages %}{{ m.content }}{% endfor %}")  # and the last to speak is the user
    assert tokenized([{"messages": DOUBLE[:2]}], open_ended, loss_on="all").num_trained > 5


def test_what_is_cut_is_counted_and_what_lost_its_answer_is_dropped(tokenizer):
    long = [{"role": "user", "content": "word " * 50}, SINGLE[1]]
    whole = tokenized([{"messages": SINGLE}, {"messages": long}, {"messages": DOUBLE}], tokenizer)
    length = len(whole.input_ids[0])
    cut = tokenized([{"messages": SINGLE}, {"messages": long}, {"messages": DOUBLE}], tokenizer, max_length=length)
    assert (cut.truncated, cut.dropped) == (2, 1)
    assert [cut.where(index) for index in range(2)] == ["t.jsonl, line 1", "t.jsonl, line 3"]
    assert cut.input_ids == [whole.input_ids[0], whole.input_ids[2][:length]]
    assert cut.labels == [whole.labels[0], whole.labels[2][:length]]


def test_marks_that_touch_are_one_turn():
    apart = CHATML_MARKED.replace("<|im_end|>{% endg", "{% endgeneration %}{% generation %}<|im_end|>{% endg")
    result = tokenized([{"messages": SINGLE}], demo(apart, MARKS))
    assert result.labels == tokenized([{"messages": SINGLE}], READY["marked"]).labels


def test_tools_reach_the_template_and_a_call_is_trained():
    template = (
        "{% for t in tools or [] %}{{ t.name }} {% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ c.name }}(){% endfor %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = demo({"default": (TRL_TEMPLATES / "llama3.jinja").read_text(), "tool_use": template}, MARKS)
    called = {"role": "assistant", "content": None, "tool_calls": [{"name": "clock"}]}
    row = {"messages": [SINGLE[0], called, {"role": "tool", "content": "12"}], "tools": [{"name": "clock"}]}
    result = tokenized([row, {"messages": SINGLE}], tokenizer)
    assert tokenizer.decode(result.input_ids[0]).startswith("clock <|im_start|>user")
    assert trained_pieces(result.input_ids[0], result.labels[0], tokenizer) == ["clock()<|im_end|>"]
    assert result.input_ids[1] == tokenizer.apply_chat_template(SINGLE)["input_ids"]


@pytest.mark.parametrize("template", [LLAMA3, CHATML_MARKED])
def test_a_template_that_reads_texts_only_gets_the_texts_of_parts(template):
    def parted(messages):
        return [one | {"content": [{"type": "text", "text": part} for part in one["content"]]} for one in messages]

    tokenizer = demo(template, MARKS)
    for loss_on in ("answers", "all"):
        ours, plain = (tokenized([{"messages": m}], tokenizer, loss_on=loss_on) for m in (parted(DOUBLE), DOUBLE))
        assert (ours.input_ids, ours.labels) == (plain.input_ids, plain.labels)
