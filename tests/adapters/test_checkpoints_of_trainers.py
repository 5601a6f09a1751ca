"""transformers' Trainer resumes a run of a model from `qsvd.load`, and loads its best checkpoint."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, Trainer, TrainingArguments

import qsvd
from qsvd.adapters.model import trained
from tests.checkpoints import tiny_config
from tests.drawn import drawn_base
from tests.runs import TEXTS


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    config = tiny_config("LlamaForCausalLM", vocab_size=4096, num_hidden_layers=1)
    return drawn_base(tmp_path_factory.mktemp("base") / "out", config, 16)


def make(base, folder, *, unfrozen=False, **more):
    model = qsvd.load(base, device="cpu", dtype=torch.float32)
    if unfrozen:
        model.model.norm.weight.requires_grad_()  # by hand
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.eos_token
    data = Dataset.from_dict({"input_ids": [tokenizer(text).input_ids[:12] for text in TEXTS[:8]]})
    settings = TrainingArguments(
        str(folder), per_device_train_batch_size=2, max_steps=4, save_steps=2, learning_rate=3e-3, report_to="none",
        use_cpu=True, disable_tqdm=True, **more,
    )  # fmt: skip
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return Trainer(model, settings, data_collator=collate, train_dataset=data, eval_dataset=data)


def values(trainer):
    return {name: p.detach().clone() for name, p in trained(trainer.model).items()}


@pytest.mark.parametrize("unfrozen", [False, True])
def test_a_resumed_run_ends_where_one_without_a_stop_does(base, tmp_path, unfrozen, caplog):
    whole = make(base, tmp_path / "whole", unfrozen=unfrozen)
    whole.train()
    resumed = make(base, tmp_path / "resumed", unfrozen=unfrozen)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    expected, found = values(whole), values(resumed)
    assert ("model.norm.weight" in expected) == unfrozen
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert "missing keys" not in caplog.text


def test_the_best_checkpoint_is_loaded_at_the_end_and_qsvd_opens_it(base, tmp_path):
    """The highest loss counts as best here, so that it is not the last checkpoint."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = make(base, tmp_path, eval_strategy="steps", eval_steps=2, **best)
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert losses[2] > losses[4]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[2], rel=1e-6)
    opened = qsvd.load(base, adapter=tmp_path / "checkpoint-2", device="cpu", dtype=torch.float32)
    assert all(torch.equal(p, trained(trainer.model)[name]) for name, p in trained(opened).items())
