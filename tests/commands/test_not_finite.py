"""Numbers that are NaN or infinite: named before the work in 16-bit models, and never a result."""

import json
import re
import shutil

import pytest
import safetensors.torch
import torch

from qsvd.calibrate.sums import Sums
from qsvd.cli import run
from qsvd.commands import eval as qsvd_eval
from qsvd.commands import generate as qsvd_generate
from qsvd.console import journal
from qsvd.files.check import check_complete, check_finite
from qsvd.files.source import open_checkpoint
from qsvd.plan.weights import plan_model
from tests.published import write_published
from tests.runs import labelled_rows, text_rows, training, words, write_rows

LAYER = "model.layers.0.self_attn."
WRONG = {  # tensor -> a value and its number of places
    "model.embed_tokens.weight": (float("nan"), 2),
    f"{LAYER}v_proj.weight": (float("-inf"), 1),
    "model.norm.weight": (float("inf"), 3),
}
NAMED = "3 tensors have values that are NaN or infinite: "


@pytest.fixture(scope="module")
def damaged(language, tmp_path_factory):
    """Its 16-bit model with WRONG."""
    folder = shutil.copytree(language.parent / "source", tmp_path_factory.mktemp("damaged") / "model")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    for name, (value, count) in WRONG.items():
        tensors[name].view(-1)[:count] = value
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "command",
    [
        "quantize MODEL --out OUT --rank 4",
        "quantize MODEL --out OUT --budget 3bits",
        "allocate MODEL --out OUT --budget 3bits",
        "calibrate MODEL DATA --out OUT --examples 2",
        "train MODEL DATA --out OUT --steps 1 --max-length 32",
        "eval MODEL --data DATA",
        "generate MODEL --prompt Once",
    ],
)
def test_every_tensor_is_named_before_the_work(damaged, tmp_path, capsys, command):
    data = write_rows(tmp_path / "d.jsonl", text_rows())
    named = {"MODEL": damaged, "OUT": tmp_path / "out", "DATA": data}
    assert run([str(named.get(word, word)) for word in [*command.split(), "--device", "cpu"]]) == 2
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert NAMED in sentence
    assert all(name in sentence for name in WRONG)
    assert [path.name for path in tmp_path.iterdir()] == ["d.jsonl"]


@pytest.mark.parametrize("family", ["DeepseekV3", "GptOss"])
def test_models_in_8_and_4_bits_are_decoded_and_their_experts_read(tmp_path, family, monkeypatch, caplog):
    monkeypatch.setattr("qsvd.files.check.MOST_UNTOLD", 0)
    write_published(tmp_path, family)

    def check():
        checkpoint = open_checkpoint(str(tmp_path))
        check_finite(checkpoint, check_complete(checkpoint, plan_model(checkpoint.config)))

    check()
    assert re.search(r": first, 0 GB are read once to find NaN and infinity$", caplog.text, re.MULTILINE)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    name = next(name for name in tensors if "experts" in name and "scale" in name and name != "e_score")
    tensors[name].view(-1)[-1:] = 255 if tensors[name].dtype == torch.uint8 else torch.nan
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 tensors have values .*experts.*\(\d+ of \d+\); repair the checkpoint"):
        check()


def spoilt(load):
    """The function that loads, with a NaN in a parameter that no output can do without."""

    def loaded(*found, **how):
        model = load(*found, **how)
        norm = next(value for name, value in model.named_parameters() if name.lower().endswith("norm.weight"))
        norm.data[0] = torch.nan
        return model

    return loaded


ANSWERS = [{"prompt": "How many?", "completion": "#### 7"}]


@pytest.mark.parametrize(
    ("rows", "task"), [(text_rows(), []), (ANSWERS, []), (ANSWERS, ["--task", "exact-match", "--max-new-tokens", "2"])]
)
def test_a_result_that_is_not_finite_ends_eval(language, tmp_path, monkeypatch, capsys, rows, task):
    monkeypatch.setattr(qsvd_eval, "load_model", spoilt(qsvd_eval.load_model))
    data = write_rows(tmp_path / "d.jsonl", rows)
    window = [] if task else ["--window", "32"]
    assert run(["eval", str(language), "--data", data, "--device", "cpu", *window, *task]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "NaN or infinite, or overflow while it runs; give --dtype float32, or check its files" in shown.err


def test_a_divergence_that_is_not_finite_ends_eval(language, tmp_path, monkeypatch, capsys):
    load = qsvd_eval.load_model
    models = iter([load, spoilt(load)])
    monkeypatch.setattr(qsvd_eval, "load_model", lambda *found, **how: next(models)(*found, **how))
    data = write_rows(tmp_path / "d.jsonl", text_rows())
    reference = str(language.parent / "source")
    words = ["eval", str(language), "--data", data, "--reference", reference, "--device", "cpu", "--window", "32"]
    assert run(words) == 1
    assert f"qsvd: {language}: kl_mean is nan, " in capsys.readouterr().err


def test_a_classifier_that_gives_nan_has_no_accuracy(bert, tmp_path, monkeypatch, capsys):
    data = write_rows(tmp_path / "d.jsonl", labelled_rows())
    assert run(words(training(bert, data, tmp_path / "run", steps=1))) == 0
    monkeypatch.setattr(qsvd_eval, "load_model", spoilt(qsvd_eval.load_model))
    capsys.readouterr()
    assert run(["eval", str(tmp_path / "run"), "--data", data, "--device", "cpu"]) == 1
    assert f"qsvd: {tmp_path / 'run'}: label_nats is nan" in capsys.readouterr().err


def test_nothing_is_generated_from_logits_that_are_nan(language, monkeypatch, capsys):
    monkeypatch.setattr(qsvd_generate, "load_generating", spoilt(qsvd_generate.load_generating))
    assert run(["generate", str(language), "--prompt", "Once", "--max-new-tokens", "3", "--device", "cpu"]) == 1
    shown = capsys.readouterr()
    assert shown.out.strip() == ""
    assert shown.err.startswith("qsvd: the model's logits are NaN")


def test_sums_that_overflow_end_calibrate_before_they_are_kept(language, tmp_path, monkeypatch, capsys):
    add = Sums.add_gradient
    monkeypatch.setattr(Sums, "add_gradient", lambda self, name, gradient: add(self, name, gradient * 1e30))
    data = write_rows(tmp_path / "d.jsonl", text_rows())
    source, out = language.parent / "source", tmp_path / "out"
    assert run(["calibrate", str(source), data, "--out", str(out), "--examples", "2", "--device", "cpu"]) == 2
    assert "sums of gradients are NaN or infinite (" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir() if "lock" not in path.name) == ["d.jsonl"]


def test_a_held_out_loss_that_is_not_finite_ends_the_run(language, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        journal, "_held_out_loss", lambda *_: {"held_out_before": float("inf"), "accuracy_before": None}
    )
    data = write_rows(tmp_path / "d.jsonl", text_rows())
    assert run(words(training(language, data, tmp_path / "run"))) == 1
    assert "qsvd: the held-out loss is inf: " in capsys.readouterr().err
    assert not (tmp_path / "run" / "start.json").exists()


def test_an_adapter_that_the_last_step_spoils_is_not_written(language, tmp_path, monkeypatch, capsys):
    finish = journal.finish_run

    def finished(run, folder, trainer, recorder):
        next(iter(journal.trained(trainer.model).values())).data[0] = torch.inf
        finish(run, folder, trainer, recorder)

    monkeypatch.setattr("qsvd.commands.train.finish_run", finished)
    data = write_rows(tmp_path / "d.jsonl", text_rows())
    assert run(words(training(language, data, tmp_path / "run", steps=1))) == 1
    assert "qsvd: after the last step 1 trained tensors are NaN or infinite (" in capsys.readouterr().err
    assert not (tmp_path / "run" / "summary.json").exists()
    assert json.loads((tmp_path / "run" / "run.json").read_text())
