"""The chat templates by name: their text against TRL's copies of the published ones, and by what was published."""

from pathlib import Path

import jinja2
import pytest
import trl

from qsvd.data import template_names
from qsvd.data.masks import ends_of_turn
from qsvd.data.template_names import TOKENS, check_tokens, read_template
from tests.data.templates import SINGLE, demo, tokenized
from tests.data.test_chat import trained_pieces

TRL = Path(trl.__file__).parent / "chat_templates"
ALL_TOKENS = [token for tokens in TOKENS.values() for token in tokens]
TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Me."},
]
SYSTEM = {"role": "system", "content": "Be brief."}
PUBLISHED = {  # of TURNS, with the tokens <s> and </s>; the name's model card or its authors' code says so
    "mistral": "<s>[INST] Hi [/INST]Hello.</s>[INST] Who? [/INST]Me.</s>",
    "zephyr": "<|user|>\nHi</s>\n<|assistant|>\nHello.</s>\n<|user|>\nWho?</s>\n<|assistant|>\nMe.</s>\n",
    "vicuna": (
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: Hi ASSISTANT: Hello.</s>USER: Who? ASSISTANT: "
        "Me.</s>"
    ),
    "alpaca": (
        "<s>Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nHi\n\n### Response:\nHello.</s>\n\n### Instruction:\nWho?\n\n### Response:\nMe.</s>\n\n"
    ),
}
BEGIN = {"mistral": "", "zephyr": "<|assistant|>\n", "vicuna": "ASSISTANT:", "alpaca": "### Response:\n"}


def tokenizer_with(name):
    """The demo model's tokenizer with a template, the tokens <s> and </s>, and those of all templates."""
    tokenizer = demo(read_template(name), [*ALL_TOKENS, "<s>", "</s>"])
    tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    return tokenizer


def text(tokenizer, messages, *, begin=False, template=None):
    return tokenizer.apply_chat_template(messages, template, tokenize=False, add_generation_prompt=begin)


@pytest.mark.parametrize(
    ("name", "file", "messages"),
    [
        ("llama3", "llama3", [SYSTEM, *TURNS]),
        ("gemma", "gemma", TURNS),
        ("chatml", "qwen2_5", [SYSTEM, *TURNS]),
    ],
)
def test_the_text_is_that_of_the_published_template(name, file, messages):
    tokenizer, theirs = tokenizer_with(name), (TRL / f"{file}.jinja").read_text(encoding="utf-8")
    for part in (messages, messages[:-1]):
        begin = part[-1]["role"] == "user"
        assert text(tokenizer, part, begin=begin) == tokenizer.apply_chat_template(
            part, chat_template=theirs, tokenize=False, add_generation_prompt=begin
        )


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_text_is_the_published_one(name):
    tokenizer = tokenizer_with(name)
    assert text(tokenizer, TURNS) == PUBLISHED[name]
    before = PUBLISHED[name][: PUBLISHED[name].rindex("Me.")].removesuffix(" " if name == "vicuna" else "")
    assert text(tokenizer, TURNS[:3], begin=True) == before
    assert before.endswith(BEGIN[name])


@pytest.mark.parametrize("name", TOKENS)
def test_answers_are_trained_with_the_token_that_ends_them(name):
    tokenizer = tokenizer_with(name)
    result = tokenized([{"messages": TURNS}], tokenizer)
    end = TOKENS[name][-1] if TOKENS[name] else "</s>"
    start = " " if name == "vicuna" else ""
    pieces = trained_pieces(result.input_ids[0], result.labels[0], tokenizer)
    assert pieces == [f"{start}Hello.{end}", f"{start}Me.{end}"]
    assert ends_of_turn(tokenizer) == [tokenizer.convert_tokens_to_ids(end)]


WITHOUT_FORM = {"gemma": [SYSTEM, *TURNS], "mistral": TURNS[1:], "vicuna": [*TURNS, SYSTEM]}


@pytest.mark.parametrize(("name", "messages"), WITHOUT_FORM.items())
def test_a_conversation_that_has_no_published_form_is_refused(name, messages):
    with pytest.raises(jinja2.TemplateError, match=r"must alternate|has no place here"):
        text(tokenizer_with(name), messages)


def test_instructions_take_a_system_message_of_their_own():
    for name in ("alpaca", "vicuna"):
        assert text(tokenizer_with(name), [SYSTEM, *SINGLE]).startswith("<s>Be brief.")


def test_every_file_has_its_name_in_the_table():
    folder = Path(template_names.__file__).parent / "templates"
    assert {path.stem for path in folder.glob("*.jinja")} == set(TOKENS)


def test_tokens_that_the_tokenizer_lacks_are_named_and_templates_that_fit():
    said = r"chatml needs the tokens <\|im_start\|>, <\|im_end\|>, .*; it can use alpaca, mistral, vicuna, zephyr$"
    with pytest.raises(ValueError, match=said):
        check_tokens("chatml", demo())
    check_tokens("alpaca", demo())


def test_a_file_is_read_and_one_that_is_not_there_is_refused(tmp_path):
    (tmp_path / "own.jinja").write_text("{{ messages }}")
    assert read_template(str(tmp_path / "own.jinja")) == "{{ messages }}"
    (tmp_path / "empty.jinja").write_text(" \n")
    for name, said in (("empty.jinja", "is empty$"), ("none.jinja", "is neither a file nor one of alpaca, chatml,")):
        with pytest.raises(ValueError, match=said):
            read_template(str(tmp_path / name))
    with pytest.raises(ValueError, match=r"\(did you mean llama3\?\)$"):
        read_template("llama-3")
