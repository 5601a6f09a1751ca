"""A run that is trained with a chat template of its own: generate, eval and export use it."""

import json

import pytest
from transformers import AutoTokenizer

import qsvd
from qsvd.cli import run as qsvd_command
from qsvd.data.template_names import read_template
from qsvd.options import Generate
from qsvd.prepare.generate import prepare_generate
from tests.runs import TEXTS, training, words, write_rows

pytestmark = pytest.mark.slow
CHATS = [
    {"messages": [{"role": "user", "content": text[:40]}, {"role": "assistant", "content": text[40:80]}]}
    for text in TEXTS
]


@pytest.fixture(scope="module")
def made(language, tmp_path_factory):
    """The quantized model, whose tokenizer has no chat template, the data, and a run with a template."""
    folder = tmp_path_factory.mktemp("chats")
    base, data = language, write_rows(folder / "chats.jsonl", CHATS)
    options = training(base, data, folder / "run", chat_template="alpaca", max_length=96, steps=1, any_start=True)
    assert qsvd_command(words(options)) == 0
    return base, data, folder / "run"


def test_the_run_and_its_checkpoints_keep_the_template(made):
    base, _, run = made
    for folder in (run, run / "checkpoint-1"):
        assert (folder / "chat_template.jinja").read_text() == read_template("alpaca")
    model = qsvd.load(base, adapter=run)
    model.save_pretrained(run.parent / "again")
    assert (run.parent / "again" / "chat_template.jinja").read_text() == read_template("alpaca")


def test_generate_asks_in_the_form_of_the_training_data(made):
    base, _, run = made
    prepared = prepare_generate(Generate(str(run), device="cpu"), ["Where is Zoë?"])
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert tokenizer.chat_template is None
    asked = [{"role": "user", "content": "Where is Zoë?"}]
    expected = tokenizer.apply_chat_template(
        asked, chat_template=read_template("alpaca"), add_generation_prompt=True, return_dict=False
    )
    assert prepared.prompts[0]["input_ids"].tolist() == [expected]
    assert tokenizer.eos_token_id in prepared.sampling.eos_token_id


def test_eval_measures_answers_in_it_and_a_model_without_one_says_what_is_missing(made, capsys):
    base, data, run = made
    assert qsvd_command(["eval", str(run), "--data", data, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)["models"][0]
    assert values["tokens"] > 0
    assert qsvd_command(["eval", str(base), "--data", data]) == 2
    assert "no chat template" in capsys.readouterr().err


def test_an_export_has_it(made, tmp_path):
    _, _, run = made
    assert qsvd_command(["export", str(run), "--to", "merged", "--out", str(tmp_path / "merged"), "--no-check"]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == read_template("alpaca")


def test_data_without_turns_and_a_tokenizer_without_the_marks_are_refused(made, tmp_path, capsys):
    base, data, _ = made
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    said = "--chat-template is for conversations and instructions; "
    for file, name, sentence in (
        (texts, "alpaca", said),
        (data, "chatml", "needs the tokens <|im_start|>, <|im_end|>"),
    ):
        assert qsvd_command(words(training(base, file, tmp_path / "run", chat_template=name))) == 2
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
