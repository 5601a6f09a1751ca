"""TRL's own trainers take a model from `qsvd.load` as it is."""

import math

import pytest
import safetensors.torch
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer

import qsvd
from qsvd.adapters.model import trained
from tests.adapters.results import in_float32
from tests.runs import TEXTS, TRAINED, language_base

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore:.*gradient_checkpointing. is deprecated:FutureWarning"
    ),  # TRL asks for an old name
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),
]

STEPS = 3
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


# On some CPUs bitsandbytes computes the reference in bfloat16. RLOO's estimate is a difference of log-probabilities, of
# first order in that rounding; GRPO's is of second order.
ROUNDED = {"rloo": 2.0**-8, "grpo": 1e-3}


def load(out, method="pissa"):
    return qsvd.load(out, options=qsvd.AdapterOptions(method, rank=None if method in ("pissa", "sorsa") else 4))


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


def test_dpo_moves_the_adapters_away_from_the_reference(out, tokenizer, tmp_path):
    model = load(out, "edora")
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


def plain(out):
    """OUT in plain transformers and PEFT, its components trainable."""
    return PeftModel.from_pretrained(in_float32(AutoModelForCausalLM.from_pretrained(out)), out, is_trainable=True)


def policy_trainer(name, model, tokenizer, folder):
    """DPO, GRPO or RLOO as the guide has them, without a reference model."""
    if name == "dpo":
        return dpo(model, None, tokenizer, folder)
    make, settings = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}[name]
    sizes = {"num_generations": 2, "max_completion_length": 8, "beta": 0.1, "max_steps": 3, "save_strategy": "no"}
    return make(
        model,
        reward_funcs=lambda completions, **_: [float(len(text) % 7) for text in completions],
        args=settings(str(folder), **PLAIN, **sizes),
        train_dataset=Dataset.from_list([{"prompt": text[:20]} for text in TEXTS[:4]]),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize(("name", "opened"), [("dpo", "qsvd"), ("grpo", "qsvd"), ("rloo", "qsvd"), ("dpo", "peft")])
def test_trl_makes_the_reference_from_the_whole_model(out, tokenizer, tmp_path, name, opened):
    """The reference is the quantized model before training; the residual alone has other logits by far."""
    model = load(out) if opened == "qsvd" else plain(out)
    ids = tokenizer("She said that", return_tensors="pt").input_ids
    with torch.no_grad():
        start = load(out)(input_ids=ids).logits  # not of `model`: bitsandbytes cannot train on a CPU after eval
    trainer = policy_trainer(name, model, tokenizer, tmp_path)
    trainer.train()
    entries = trainer.state.log_history
    assert any("kl" in entry or "rewards/margins" in entry for entry in entries)
    if name == "dpo":
        assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-2)
    else:
        assert abs(entries[0]["kl"]) < ROUNDED[name] < abs(entries[2]["kl"])
    with torch.no_grad():
        if opened == "peft":
            model.set_adapter("ref")
        reference = (model if opened == "peft" else trainer.ref_model).eval()(input_ids=ids).logits
    assert (reference - start).abs().max() < 0.02 * start.abs().max()  # bitsandbytes computes in bfloat16 on some CPUs


@pytest.mark.parametrize("name", ["dpo", "grpo", "rloo"])
def test_a_run_has_no_reference_that_trl_can_load(out, tokenizer, tmp_path, name):
    load(out).save_pretrained(tmp_path / "run")
    trained_model = qsvd.load(out, adapter=tmp_path / "run")
    with pytest.raises(OSError, match=r"Give DPOTrainer ref_model=model\.reference\(\).*set beta=0, or open the run"):
        policy_trainer(name, trained_model, tokenizer, tmp_path)


@pytest.mark.parametrize("target", [None, "all-linear", ["lm_head"]])
def test_a_peft_config_is_refused_in_one_sentence(out, tokenizer, tmp_path, target):
    settings = SFTConfig(str(tmp_path), max_steps=1, **PLAIN)
    data = Dataset.from_list([{"text": text} for text in TEXTS[:8]])
    model, peft_config = load(out), LoraConfig(target_modules=target)
    with pytest.raises(ValueError, match=r"leave out peft_config, and choose the method and rank with qsvd\.load"):
        SFTTrainer(model, args=settings, train_dataset=data, processing_class=tokenizer, peft_config=peft_config)
    with pytest.raises(ValueError, match="leave out peft_config"):
        model.add_adapter(peft_config)


def test_sft_trains_saves_and_generates(out, tokenizer, tmp_path):
    model = load(out, "dora")
    before, start = frozen(model), {name: p.detach().clone() for name, p in trained(model).items()}
    settings = SFTConfig(str(tmp_path), max_steps=2, save_steps=1, max_length=64, **PLAIN)
    data = Dataset.from_list([{"text": text} for text in TEXTS[:8]])
    trainer = SFTTrainer(model, args=settings, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    assert all(map(math.isfinite, losses(trainer)))
    assert_only_adapters_moved(model, before, start)
    assert_comes_back(out, tmp_path / "checkpoint-2", model)
    written, resumed = (
        safetensors.torch.load_file(tmp_path / "checkpoint-2" / file).keys() for file in (TRAINED, "model.safetensors")
    )
    assert {name.replace(".adapter.", ".") for name in resumed} == written, "no frozen weight is written"
    prompt = tokenizer("She said", return_tensors="pt").input_ids
    written = model.eval().generate(prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    again = qsvd.load(out, adapter=tmp_path / "checkpoint-2")
    assert torch.equal(again.generate(prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False), written)
    assert written.shape[1] == prompt.shape[1] + 5
