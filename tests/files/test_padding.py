"""The padding token is the same for all readers of a quantized model; judged by transformers and its classifiers."""

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from qsvd.cli import run
from qsvd.commands.demo import MODEL
from qsvd.data.examples import open_tokenizer
from tests.runs import TEXTS, labelled_rows, language_base, language_source, training, words, write_rows
from tests.sealed import without_digests

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"


def changed(folder, *, config, tokenizer):
    """Change the config and the tokenizer of a folder; None removes a key."""
    for name, changes in (("config.json", config), ("tokenizer_config.json", tokenizer)):
        table = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({key: value for key, value in table.items() if value is not None}))
    return folder


@pytest.mark.parametrize(
    ("of_config", "of_tokenizer", "expected"),
    [
        pytest.param(2, PAD, PAD, id="both"),
        pytest.param(2, EOS, PAD, id="the config, whose positions may count by it"),
        pytest.param(1, PAD, PAD, id="the tokenizer, since the config names an end token"),
        pytest.param(2, None, PAD, id="the config alone"),
        pytest.param(1, None, EOS, id="an end token, if nothing else is there"),
        pytest.param(7, None, EOS, id="no token of a text"),
        pytest.param(-1, PAD, PAD, id="a number that is none"),
        pytest.param(None, "<|added later|>", EOS, id="no token without a row"),
        pytest.param(None, None, EOS, id="none named"),
    ],
)
def test_the_token_that_is_chosen(tmp_path, of_config, of_tokenizer, expected):
    for path in MODEL.glob("*.json"):
        shutil.copyfile(path, tmp_path / path.name)
    changed(tmp_path, config={"pad_token_id": of_config}, tokenizer={"pad_token": of_tokenizer})
    assert open_tokenizer(tmp_path).pad_token == expected


def test_a_tokenizer_without_special_tokens_has_no_padding(tmp_path):
    for path in MODEL.glob("*.json"):
        shutil.copyfile(path, tmp_path / path.name)
    changed(tmp_path, config={"pad_token_id": None}, tokenizer={"pad_token": None, "eos_token": None})
    assert open_tokenizer(tmp_path).pad_token is None


def test_classifiers_of_a_model_without_padding_read_the_same_class_in_every_program(tmp_path):
    source = language_source(tmp_path / "source")
    changed(source, config={"pad_token_id": None, "eos_token_id": [0, 1]}, tokenizer={"pad_token": None})
    (source / "special_tokens_map.json").write_text(json.dumps({"pad_token": None, "eos_token": EOS}))
    out, trained, merged = (str(tmp_path / name) for name in ("base", "run", "merged"))
    assert run(["quantize", str(source), "--out", out, "--rank", "4", "--iterations", "1", "--device", "cpu"]) == 0
    assert (
        run(
            words(
                training(
                    out, write_rows(tmp_path / "d.jsonl", labelled_rows()), trained, steps=1, task="classification"
                )
            )
        )
        == 0
    )
    assert run(["export", trained, "--to", "merged", "--out", merged]) == 0
    for folder in (out, merged):
        assert AutoTokenizer.from_pretrained(folder).pad_token == EOS
        assert AutoConfig.from_pretrained(folder).pad_token_id == 1
    tokenizer = AutoTokenizer.from_pretrained(merged)
    model = AutoModelForSequenceClassification.from_pretrained(merged, dtype=torch.float32).eval()
    batch = tokenizer(TEXTS[:4], return_tensors="pt", padding=True)
    with torch.no_grad():
        together = model(**batch).logits
        alone = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in TEXTS[:4]])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_an_older_quantized_model_whose_config_pads_with_an_end_token_trains_and_measures_a_classifier(tmp_path):
    out = without_digests(language_base(tmp_path))
    changed(out, config={"pad_token_id": 1}, tokenizer={})  # the tokenizer has <|pad|>
    data, run_folder = write_rows(tmp_path / "d.jsonl", labelled_rows()), str(tmp_path / "run")
    assert run(words(training(out, data, run_folder, steps=1, task="classification", held_out=0.3))) == 0
    assert run(["export", run_folder, "--to", "merged", "--out", str(tmp_path / "merged")]) == 0
    assert AutoConfig.from_pretrained(tmp_path / "merged").pad_token_id == 2


def test_a_damaged_tokenizer_is_named_before_the_work_and_an_unknown_one_in_the_log(tmp_path, caplog, capsys):
    source = language_source(tmp_path / "source")
    command = ["quantize", str(source), "--rank", "4", "--iterations", "1", "--device", "cpu", "--out"]
    whole = (source / "tokenizer.json").read_text()
    (source / "tokenizer.json").write_text(whole[:-9])
    assert run([*command, str(tmp_path / "no")]) == 2
    assert "tokenizer.json is not valid JSON" in capsys.readouterr().err
    (source / "tokenizer.json").write_text("{}")
    assert run([*command, str(tmp_path / "yes")]) == 0
    assert "but qsvd train and eval refuse it like that" in caplog.text
