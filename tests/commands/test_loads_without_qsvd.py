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
from qsvd.cli import run as qsvd_command
from qsvd.files.split_folder import open_split
from tests.checkpoints import SHARED_MODELS, write_checkpoint
from tests.commands.folders import write_dense, write_first_layers

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("plain_transformers.py")
ROUNDINGS = 8  # two runs in one dtype round in another order; each is off the exact result by about the same
WIDTHS = {"hidden_size": 64, "intermediate_size": 128}  # bitsandbytes decodes other widths wrongly on some CPUs


def sources(folder):
    """Name, checkpoint, class and options of each split; of really trained models those that are here."""
    write_checkpoint(folder / "source", max_shard_size="100KB", vocab_size=1024, **WIDTHS)
    yield "bfloat16", folder / "source", "AutoModelForCausalLM", {"rank": 32, "shard_size": "100KB"}
    for name, model, layers, auto, options in (
        ("float32", "stories260K", 2, "AutoModelForCausalLM", {"rank": 16}),
        ("float16", "minilm-l6", 1, "AutoModel", {"rank": 16, "double_quant": False}),
    ):
        if (SHARED_MODELS / model).is_dir():
            yield name, write_first_layers(SHARED_MODELS / model, folder / model, layers), auto, options


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """By name: what one process without qsvd finds out about the splits, and the splits."""
    folder, splits, arguments = tmp_path_factory.mktemp("cases"), {}, []
    for name, source, auto, options in sources(folder):
        out = folder / name / "out"
        splits[name] = open_split(qsvd.quantize(qsvd.Quantize(str(source), out=out, iterations=1, **options)))
        if name == "float32":  # whose down_proj has 172 in features: its README merges with qsvd
            assert qsvd_command(["export", str(out), "--to", "merged", "--out", f"{out}-merged"]) == 0
        dense = {weight: splits[name].dense(weight) for weight in splits[name].weights}
        write_dense(source, out.with_name("dense"), dense)
        arguments += [out, out.with_name("dense"), auto]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1"}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {name: (line, split) for line, (name, split) in zip(lines, splits.items(), strict=True)}


def assert_equal_to_dense(found, split):
    rounding = ROUNDINGS * found["dense_in_float32"]
    stored_rounding = ROUNDINGS * found["dense_in_stored_dtype"]
    assert found["num_linears"] == len(split.weights)
    assert found["whole"] <= rounding
    assert found["split"] <= rounding
    assert found["Load"] <= stored_rounding
    assert found["Train"] <= stored_rounding
    assert found.get("Merge", 0) <= stored_rounding
    assert ("Merge" in found) == all(weight["shape"][1] % 64 == 0 for weight in split.weights.values())
    assert found["merged"] <= stored_rounding
    assert found["num_merged_linears"] == 0
    assert found["base_alone"] > 10 * stored_rounding, "the adapter would not be missed"
    modules = [weight["module"] for weight in split.weights.values()]
    names = {f"base_model.model.{module}.lora_{letter}.default.weight" for module in modules for letter in "AB"}
    assert set(found["trained"]) == names


@pytest.mark.parametrize(("name", "weights"), [("float32", 14), ("float16", 6), ("bfloat16", 14)])
def test_outputs_are_those_of_the_dense_equivalent(found, name, weights):
    """Two layers of a trained Llama, one of a trained encoder, and a Llama in several shards."""
    if name not in found:
        pytest.skip("the trained models of the shared folder are not here")
    seen, split = found[name]
    assert len(split.weights) == weights
    assert seen["stored_dtype"] == f"torch.{name}"
    assert (len(list(split.folder.glob("model*.safetensors"))) > 1) == (name == "bfloat16")
    assert_equal_to_dense(seen, split)


def test_a_new_head_on_a_split_encoder_is_a_plain_linear_layer(tmp_path):
    write_checkpoint(tmp_path / "source", "BertModel", **WIDTHS)
    qsvd.quantize(qsvd.Quantize(str(tmp_path / "source"), out=tmp_path / "out", rank=8))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", num_labels=3)
    assert type(model.classifier) is torch.nn.Linear
    assert model.classifier.weight.is_floating_point()
    assert type(model.bert.encoder.layer[0].attention.self.query).__name__ == "Linear4bit"
