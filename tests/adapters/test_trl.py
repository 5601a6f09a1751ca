"""TRL's own trainers take a model from `qsvd.load` as it is."""

import math

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import qsvd
from qsvd.adapters.methods import METHODS
from qsvd.adapters.model import trained
from tests.runs import TEXTS, language_base

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore:.*gradient_checkpointing. is deprecated:FutureWarning"
    ),  # TRL asks for an old name
]

STEPS = 10
PAIRS = [{"prompt": "She said ", "chosen": text[:40], "rejected": text[::-1][:40]} for text in TEXTS[:8]]
PLAIN = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 1,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "activation_checkpointing": False,
}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return language_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def tokenizer(out):
    tokenizer = AutoTokenizer.from_pretrained(out)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def load(out, method="pissa"):
    return qsvd.load(out, options=qsvd.AdapterOptions(method, rank=None if method == "pissa" else 4))


def frozen(model):
    """Bytes of everything that is not trained."""
    tensors = [*model.named_buffers(), *((n, p) for n, p in model.named_parameters() if not p.requires_grad)]
    return {name: tensor.detach().clone() for name, tensor in tensors}


def assert_only_adapters_moved(model, before, start):
    assert all(torch.equal(tensor, before[name]) for name, tensor in frozen(model).items())
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".adapter." not in name)
    moved = trained(model)
    assert all(p.isfinite().all() for p in moved.values())
    assert any(not torch.equal(p, start[name]) for name, p in moved.items())


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def dpo(model, reference, tokenizer, folder):
    settings = DPOConfig(str(folder), max_steps=STEPS, max_length=64, save_strategy="no", **PLAIN)
    data = Dataset.from_list(PAIRS)
    return DPOTrainer(model, reference, args=settings, train_dataset=data, processing_class=tokenizer)


@pytest.mark.parametrize("method", METHODS)
def test_dpo_moves_the_adapters_away_from_the_reference(out, tokenizer, tmp_path, method):
    model = load(out, method)
    before, start = frozen(model), {name: p.detach().clone() for name, p in trained(model).items()}
    reference = model.reference()
    trainer = dpo(model, reference, tokenizer, tmp_path)
    assert trainer.model is model
    trainer.train()
    found = losses(trainer)
    assert len(found) == STEPS
    assert found[0] == pytest.approx(math.log(2), abs=1e-6), "at the start both models are the same"
    assert all(map(math.isfinite, found))
    assert found[-1] < found[0]
    assert_only_adapters_moved(model, before, start)
    assert all(torch.equal(p, start[name]) for name, p in named(reference, start).items())
    trainer.save_model(tmp_path / "saved")
    assert_comes_back(out, tmp_path / "saved", model)


def named(reference, names):
    """The reference's own copies of what the model trains."""
    parameters = {name.replace(".adapter.", "."): p for name, p in reference.named_parameters()}
    return {name: parameters[name] for name in names}


def assert_comes_back(out, folder, model):
    again = trained(qsvd.load(out, adapter=folder))
    assert all(torch.equal(p, again[name]) for name, p in trained(model).items())


def test_dpo_without_a_reference_stops_and_says_what_to_give(out, tokenizer, tmp_path):
    """TRL would look for one by the model's name, which is that of the residual."""
    with pytest.raises(OSError, match=r"give ref_model=model\.reference\(\)"):
        dpo(load(out), None, tokenizer, tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_sft_trains_saves_and_generates(out, tokenizer, tmp_path, method):
    model = load(out, method)
    before, start = frozen(model), {name: p.detach().clone() for name, p in trained(model).items()}
    settings = SFTConfig(str(tmp_path), max_steps=2, save_steps=1, max_length=64, **PLAIN)
    data = Dataset.from_list([{"text": text} for text in TEXTS[:8]])
    trainer = SFTTrainer(model, args=settings, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    assert all(map(math.isfinite, losses(trainer)))
    assert_only_adapters_moved(model, before, start)
    assert_comes_back(out, tmp_path / "checkpoint-2", model)
    assert not list((tmp_path / "checkpoint-2").glob("model*.safetensors")), "no frozen weight is written"
    prompt = tokenizer("She said", return_tensors="pt").input_ids
    written = model.eval().generate(prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    again = qsvd.load(out, adapter=tmp_path / "checkpoint-2")
    assert torch.equal(again.generate(prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False), written)
    assert written.shape[1] == prompt.shape[1] + 5
