"""A result is useful without us: plain transformers and PEFT load, train and merge it to the same outputs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import qsvd
from qsvd.files.split_folder import open_split
from tests.checkpoints import write_checkpoint
from tests.commands.folders import shared_model, write_dense

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("plain_transformers.py")
ROUNDINGS = 8  # two runs in one dtype round in another order; each is off the exact result by about the same
WIDTHS = {"hidden_size": 64, "intermediate_size": 128}  # bitsandbytes decodes other widths wrongly on some CPUs


def split_and_load(source, out, auto, **options):
    """What a process without qsvd finds out about the split of a checkpoint."""
    qsvd.quantize(qsvd.Quantize(str(source), out=out, **options))
    split = open_split(out)
    dense = out.with_name("dense")
    write_dense(source, dense, {name: split.dense(name) for name in split.weights})
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(SCRIPT), str(out), str(dense), auto]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), split


def assert_equal_to_dense(found, split):
    rounding = ROUNDINGS * found["dense_in_float32"]
    stored_rounding = ROUNDINGS * found["dense_in_stored_dtype"]
    assert found["num_linears"] == len(split.weights)
    assert found["split"] <= rounding
    assert found["Load"] <= stored_rounding
    assert found["Train"] <= stored_rounding
    assert found["Merge"] <= stored_rounding
    assert found["merged"] <= stored_rounding
    assert found["num_merged_linears"] == 0
    assert found["base_alone"] > 10 * stored_rounding, "the adapter would not be missed"
    modules = [weight["module"] for weight in split.weights.values()]
    names = {f"base_model.model.{module}.lora_{letter}.default.weight" for module in modules for letter in "AB"}
    assert set(found["trained"]) == names


def test_a_trained_float32_llama_gives_the_logits_of_its_dense_equivalent(tmp_path):
    source = shared_model("stories260K")
    found, split = split_and_load(source, tmp_path / "out", "AutoModelForCausalLM", rank=16)
    assert len(split.weights) == 35
    assert found["stored_dtype"] == "torch.float32"
    assert_equal_to_dense(found, split)


def test_a_trained_half_precision_encoder_gives_the_states_of_its_dense_equivalent(tmp_path):
    source = shared_model("minilm-l6")
    found, split = split_and_load(source, tmp_path / "out", "AutoModel", rank=16, iterations=1, double_quant=False)
    assert len(split.weights) == 36
    assert found["stored_dtype"] == "torch.float16"
    assert_equal_to_dense(found, split)


def test_a_bfloat16_llama_in_shards_gives_the_logits_of_its_dense_equivalent(tmp_path):
    write_checkpoint(tmp_path / "source", max_shard_size="100KB", vocab_size=1024, **WIDTHS)
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 1
    out = tmp_path / "out"
    found, split = split_and_load(tmp_path / "source", out, "AutoModelForCausalLM", rank=32, shard_size="100KB")
    assert len(list(out.glob("*.safetensors"))) > 1
    assert found["stored_dtype"] == "torch.bfloat16"
    assert_equal_to_dense(found, split)


def test_a_new_head_on_a_split_encoder_is_a_plain_linear_layer(tmp_path):
    write_checkpoint(tmp_path / "source", "BertModel", **WIDTHS)
    qsvd.quantize(qsvd.Quantize(str(tmp_path / "source"), out=tmp_path / "out", rank=8))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", num_labels=3)
    assert type(model.classifier) is torch.nn.Linear
    assert model.classifier.weight.is_floating_point()
    assert type(model.bert.encoder.layer[0].attention.self.query).__name__ == "Linear4bit"
