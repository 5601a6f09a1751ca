"""What `qsvd calibrate` cannot do is refused in one sentence, before it makes anything."""

import json
import shutil

import pytest
import safetensors.torch
import transformers

from qsvd.cli import run
from tests.checkpoints import write_checkpoint
from tests.commands import calibrations
from tests.commands.calibrations import write_rows
from tests.commands.folders import shared_model


@pytest.fixture
def refused(tmp_path, capsys):
    """Run the command, which must be refused before it makes anything; the sentence."""

    def refuse(*arguments, out=tmp_path / "never"):
        capsys.readouterr()
        assert run(["calibrate", *map(str, arguments), "--out", str(out), "--device", "cpu"]) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        (sentence,) = shown.err.splitlines()
        assert not (tmp_path / "never").exists()
        return sentence.removeprefix("qsvd: ")

    return refuse


def test_numbers_out_of_range_are_refused_all_at_once(stories, texts, refused):
    sentence = refused(stories, texts, "--examples", 0, "--max-length", 1, "--traces", -1, "--chunk", 0)
    assert sentence == (
        "--examples 0 is below 1; --max-length 1 is below 2; --traces -1 is below 0; --chunk 0 is below 1"
    )
    assert refused(stories, texts, "--max-length", 10**6) == (
        f"--max-length 1000000 is above 512, the context length of {stories}"
    )


def test_too_few_examples_are_refused_with_how_many_there_are(stories, texts, refused):
    assert refused(stories, texts, "--max-length", 100) == (
        f"{texts} gives 4 examples of at most 100 tokens, fewer than --examples 128; give more data, or --examples 4"
    )


def test_data_without_a_trained_token_are_refused(stories, tmp_path, refused):
    rows = write_rows(tmp_path / "t.jsonl", [{"text": "A cat."}, {"text": " "}])
    assert refused(stories, rows, "--examples", 1) == (
        f"{rows}: 1 untrained example: line 2 (no trained token: no text)"
    )


def test_data_of_the_wrong_kind_are_refused(stories, classifier, texts, tmp_path, refused):
    labelled = write_rows(tmp_path / "l.jsonl", [{"text": "A cat.", "label": "good"}, {"text": "No.", "label": "bad"}])
    assert refused(stories, labelled) == (
        f"{labelled} holds labelled examples, and {stories} is a LlamaForCausalLM, which learns from texts, chats or "
        "completions"
    )
    assert refused(classifier, texts) == (
        f"{texts} holds text examples, and {classifier} is a BertForSequenceClassification, which learns from "
        "labelled texts"
    )
    strange = write_rows(tmp_path / "s.jsonl", [{"text": "A cat.", "label": "good"}, {"text": "No.", "label": "odd"}])
    assert refused(classifier, strange) == (f"{strange}: 1 unknown label: line 2 ('odd'); known labels are bad, good")


def test_models_without_a_loss_and_quantized_ones_are_refused(texts, tmp_path, refused):
    encoder = shared_model("minilm-l6")
    assert refused(encoder, texts) == (
        f"{encoder} is a BertModel, which has no loss on texts or labels; give a language model (...ForCausalLM) or a "
        "classifier (...ForSequenceClassification)"
    )
    write_checkpoint(tmp_path / "quantized")
    config = json.loads((tmp_path / "quantized" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "quantized" / "config.json").write_text(json.dumps(config))
    assert refused(tmp_path / "quantized", texts).startswith("this checkpoint is already quantized: config.json has")


def test_a_regression_head_is_refused(classifier, tmp_path, refused):
    folder = shutil.copytree(classifier, tmp_path / "regression")
    config = json.loads((folder / "config.json").read_text()) | {"id2label": {"0": "score"}, "label2id": {"score": 0}}
    (folder / "config.json").write_text(json.dumps(config))
    transformers.BertForSequenceClassification.from_pretrained(folder, ignore_mismatched_sizes=True).save_pretrained(
        folder
    )
    rows = write_rows(tmp_path / "l.jsonl", [{"text": "A cat.", "label": 0}, {"text": "No.", "label": 1}])
    assert refused(folder, rows) == f"{folder} has 1 class, as for regression; 2 or more are needed"


def test_a_tokenizer_of_another_model_is_refused(tmp_path, texts, stories, refused):
    write_checkpoint(tmp_path / "small", "LlamaForCausalLM")
    for path in stories.glob("token*"):
        shutil.copyfile(path, tmp_path / "small" / path.name)
    sentence = refused(tmp_path / "small", texts, "--examples", 2)
    assert f"tokens are outside 0..95, the vocabulary of {tmp_path / 'small'}: " in sentence
    assert "put the model's own tokenizer into its folder" in sentence


def test_an_out_that_is_something_else_is_refused(stories, texts, tmp_path, refused):
    (tmp_path / "folder").mkdir()
    assert refused(stories, texts, "--examples", 4, out=tmp_path / "folder") == (
        f"--out {tmp_path / 'folder'} is a folder; give a file, such as {tmp_path / 'folder'}/statistics.safetensors"
    )
    shutil.copyfile(stories / "model.safetensors", tmp_path / "model")
    assert "was not written by qsvd calibrate" in refused(stories, texts, "--examples", 4, out=tmp_path / "model")


def test_a_loss_that_is_no_number_ends_the_run_without_a_file(tmp_path, capsys):
    folder = shutil.copytree(calibrations.stories(), tmp_path / "model")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][:] = 3e38  # finite, but what it multiplies is not
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "s.safetensors"
    assert run(["calibrate", str(folder), str(calibrations.texts()), "--out", str(out), "--examples", "2"]) == 2
    assert ": the loss of an example is nan: numbers overflow in torch.float32" in capsys.readouterr().err
    assert not out.exists()
