"""Plain transformers opens OUT whole, residual and components; PEFT and TRL train from it without a second copy."""

import json
import os
import shutil

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import qsvd
from qsvd.adapters.model import trained
from tests.adapters.results import IDS, in_float32, split_checkpoint
from tests.checkpoints import write_checkpoint
from tests.commands.measurements import few_candidates
from tests.runs import TEXTS
from tests.sealed import reseal, without_digests

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning"),  # PEFT, TRL: old name
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),
]
WIDTHS = {"hidden_size": 64, "intermediate_size": 128}  # bitsandbytes decodes other widths wrongly on some CPUs


@pytest.fixture(autouse=True)
def _few(monkeypatch):
    """Two codecs and two ranks are enough for a model of mixed ones."""
    few_candidates(monkeypatch, 0, 4)


def quantized(folder, **options):
    write_checkpoint(folder / "source", **WIDTHS)
    return qsvd.quantize(qsvd.Quantize(str(folder / "source"), out=folder / "out", iterations=1, **options))


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def assert_opens_whole(where, out):
    ours = logits(qsvd.load(out, device="cpu", dtype=torch.float32))
    theirs = logits(in_float32(AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32)))
    assert (theirs - ours).abs().max() <= 1e-5 * ours.abs().max()


@pytest.mark.parametrize(("rank", "nested"), [(0, True), (16, False)])
def test_from_pretrained_equals_load(tmp_path, rank, nested):
    out = quantized(tmp_path, rank=rank, double_quant=nested)
    assert_opens_whole(out, out)


def test_a_mixed_model_opens_whole(tmp_path):
    out = quantized(tmp_path, budget="5bits")
    assert {weight["rank"] for weight in json.loads((out / "qsvd.json").read_text())["weights"].values()} != {0}
    assert_opens_whole(out, out)


def test_a_moved_folder_opens_from_another_working_folder(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "source", **WIDTHS)
    monkeypatch.chdir(tmp_path)
    qsvd.quantize(qsvd.Quantize("source", out=tmp_path / "out", rank=4, iterations=1))
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    moved = shutil.move("out", tmp_path / "elsewhere" / "moved")
    monkeypatch.chdir(tmp_path / "elsewhere" / "deep")
    assert_opens_whole("../moved", moved)


def test_a_snapshot_of_the_hubs_cache_opens_whole(tmp_path):
    """The cache has a link to a blob for every file."""
    out = quantized(tmp_path, rank=4)
    repository = tmp_path / "cache" / "models--someone--model"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(out.iterdir())):
        shutil.copyfile(path, repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(os.path.relpath(repository / "blobs" / str(number), snapshot))
    assert_opens_whole(snapshot, snapshot)


def test_components_of_version_0_1_0_are_read_from_their_folder(tmp_path):
    out = split_checkpoint(tmp_path)
    expected = logits(qsvd.load(out))
    (out / "adapter").mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (out / name).rename(out / "adapter" / name)
    reseal(without_digests(out) / "qsvd.json", lambda manifest: manifest.update(format=1))
    assert torch.equal(logits(qsvd.load(out)), expected)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "format"])
def test_what_cannot_be_read_whole_is_refused(tmp_path, file):
    out = split_checkpoint(tmp_path)
    if file == "format":
        reseal(out / "qsvd.json", lambda manifest: manifest.update(format=5))
    else:
        (out / file).unlink()
    with pytest.raises(ValueError, match=r"has format 5; .* install a newer" if file == "format" else f"lacks {file}"):
        qsvd.load(out)


@pytest.mark.parametrize("options", [{"rank": 8}, {"budget": "5bits"}])
def test_peft_trains_the_components_and_makes_no_second_copy(tmp_path, options):
    out = quantized(tmp_path, **options)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(out), out, is_trainable=True)
    ours = qsvd.load(out, options=qsvd.AdapterOptions("pissa"), device="cpu", dtype=torch.float32)
    weights = json.loads((out / "qsvd.json").read_text())["weights"].values()
    lora = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert len(lora) == 2 * sum(weight["rank"] > 0 for weight in weights)
    assert all(p.requires_grad for p in lora.values())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(
        weight["rank"] * sum(weight["shape"]) for weight in weights
    )
    loss = in_float32(model)(input_ids=IDS, labels=IDS).loss
    expected = ours(input_ids=IDS, labels=IDS).loss
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = {name.removeprefix("base_model.model."): p.grad for name, p in lora.items()}
    own = {name: p.grad for name, p in trained(ours).items()}
    assert len(own) == len(gradients)
    for name, gradient in own.items():
        module, _, factor = name.rpartition(".")
        letter = {"up": "B", "down": "A"}[factor]
        theirs = gradients[f"{module}.lora_{letter}.default.weight"]
        torch.testing.assert_close(theirs, gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_trls_first_loss_is_ours(language, tmp_path):
    out = language
    tokenizer = AutoTokenizer.from_pretrained(out)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token or tokenizer.eos_token
    settings = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "logging_steps": 1}
    settings |= {"max_steps": 2, "max_length": 64, "save_strategy": "no", "activation_checkpointing": False}
    data = Dataset.from_list([{"text": text} for text in TEXTS[:8]])
    plain = in_float32(AutoModelForCausalLM.from_pretrained(out))
    losses = {}
    for name, model in (
        ("theirs", PeftModel.from_pretrained(plain, out, is_trainable=True)),
        ("ours", qsvd.load(out, device="cpu", dtype=torch.float32)),
    ):
        arguments = SFTConfig(str(tmp_path / name), **settings)
        trainer = SFTTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer)
        trainer.train()
        losses[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses["theirs"][0] == pytest.approx(losses["ours"][0], rel=1e-4)
    assert losses["theirs"][1] == pytest.approx(losses["ours"][1], rel=1e-3)
