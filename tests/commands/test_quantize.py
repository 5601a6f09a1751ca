"""From a checkpoint to a result: W ~ Q + B A as stated, everything else untouched; judged on the files alone."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import safetensors.torch
import torch

import qsvd
from qsvd.cli import run
from tests import reference
from tests.checkpoints import write_checkpoint
from tests.commands.folders import components_of, files_of, shared_model, tensors_of

ROUNDOFF = 1e-5  # relative; a Frobenius norm of float32 differences, from float32 residuals and products
WIDTHS = {"hidden_size": 64, "intermediate_size": 128}
NF4_STATE = "quant_state.bitsandbytes__nf4"


def scales_of(tensors, name, state):
    """The block scales of one weight, by the definition of double quantization."""
    absmax = tensors[f"{name}.absmax"]
    if "nested_blocksize" not in state:
        return absmax.double().numpy()
    levels, codes = tensors[f"{name}.nested_quant_map"].double().numpy(), absmax.numpy()
    nested = reference.spread(tensors[f"{name}.nested_absmax"].numpy(), codes.size, state["nested_blocksize"])
    return levels[codes] * nested + state["nested_offset"]


def residual_of(tensors, name):
    """Q in float64, decoded by the definition of NF4."""
    state = json.loads(tensors[f"{name}.{NF4_STATE}"].numpy().tobytes())
    codes = reference.unpacked(tensors[name].numpy().reshape(-1), int(np.prod(state["shape"])))
    return reference.nf4_decode(codes, scales_of(tensors, name, state), tuple(state["shape"]), state["blocksize"])


def assert_split_as_stated(source, out, *, architecture_prefix="base_model.model."):
    """Every record of errors.jsonl is the error of the stored split, and all other tensors are the source's."""
    original, tensors = tensors_of(source), tensors_of(out)
    records = [json.loads(line) for line in (out / "errors.jsonl").read_text().splitlines()]
    weights = json.loads((out / "qsvd.json").read_text())["weights"]
    names = {weight["module"]: name for name, weight in weights.items()}
    assert [record["name"] for record in records] == list(names)
    adapter = components_of(out)
    for record in records:
        name, module = names[record["name"]], record["name"]
        weight = original[name].double().numpy()
        dense = residual_of(tensors, name)
        if record["rank"]:
            up, down = (adapter.pop(f"{architecture_prefix}{module}.lora_{letter}.weight") for letter in "BA")
            assert up.shape[1] == down.shape[0] == record["rank"]
            dense = dense + up.double().numpy() @ down.double().numpy()
        size = np.linalg.norm(weight)
        assert record["shape"] == list(weight.shape)
        assert record["weight_frobenius"] == pytest.approx(size, rel=ROUNDOFF)
        assert record["after"]["frobenius"] == pytest.approx(np.linalg.norm(weight - dense), abs=ROUNDOFF * size)
        plain = reference.nf4_round_trip(weight, double_quant=f"{name}.nested_absmax" in tensors)
        assert record["before"]["frobenius"] == pytest.approx(np.linalg.norm(weight - plain), rel=1e-3)  # ties, nesting
    assert adapter == {}, "factors of no record"
    kept = {name: tensor for name, tensor in tensors.items() if not any(name.startswith(split) for split in weights)}
    assert kept.keys() == original.keys() - weights.keys()
    assert all(tensor.dtype == original[name].dtype for name, tensor in kept.items())
    assert all(torch.equal(tensor, original[name]) for name, tensor in kept.items())
    return {record["name"]: record for record in records}


@pytest.mark.parametrize(("dtype", "tied"), [(torch.float32, False), (torch.bfloat16, True), (torch.float16, False)])
def test_every_weight_of_a_llama_in_shards_is_split_as_stated(tmp_path, dtype, tied):
    source = tmp_path / "source"
    write_checkpoint(source, dtype=dtype, tie_word_embeddings=tied, max_shard_size="40KB")
    assert len(list(source.glob("*.safetensors"))) > 1
    out = qsvd.quantize(qsvd.Quantize(str(source), out=tmp_path / "out", rank=8, double_quant=tied))
    records = assert_split_as_stated(source, out)
    assert len(records) == 14
    assert ("lm_head.weight" in tensors_of(out)) == (not tied)
    assert all(record["after"]["frobenius"] < record["before"]["frobenius"] for record in records.values())


@pytest.mark.parametrize(
    ("architecture", "num_weights", "task", "dtype"),
    [
        ("BertModel", 12, None, "bfloat16"),
        ("BertForMaskedLM", 12, None, "float32"),
        ("GPTNeoXForCausalLM", 8, "CAUSAL_LM", "float32"),
        ("OPTForCausalLM", 12, "CAUSAL_LM", "bfloat16"),
        ("ViTModel", 12, None, "float32"),
    ],
)
def test_models_with_biases_are_split_as_stated(tmp_path, architecture, num_weights, task, dtype):
    source = tmp_path / "source"
    write_checkpoint(source, architecture)
    out = qsvd.quantize(qsvd.Quantize(str(source), out=tmp_path / "out", rank=5, dtype=dtype, iterations=2))
    records = assert_split_as_stated(source, out)
    assert len(records) == num_weights
    assert sum(name.endswith(".bias") for name in tensors_of(out)) >= num_weights
    adapter = safetensors.torch.load_file(out / "adapter_model.safetensors")
    assert {str(tensor.dtype) for tensor in adapter.values()} == {f"torch.{dtype}"}
    assert peft.PeftConfig.from_pretrained(out).task_type == task


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 8])
def test_a_trained_model_is_split_as_stated_and_plain_nf4_costs_what_is_known(tmp_path, rank):
    source = shared_model("stories260K")
    out = qsvd.quantize(qsvd.Quantize(str(source), out=tmp_path / "out", rank=rank, double_quant=False))
    records = assert_split_as_stated(source, out)
    assert len(records) == 35
    ratios = np.array(
        [
            [record[side]["frobenius"] / record["weight_frobenius"] for side in ("before", "after")]
            for record in records.values()
        ]
    )
    before, after = ratios.mean(axis=0)
    assert before == pytest.approx(0.0925, abs=5e-5)  # of the model's card, to its last digit: the mean over weights
    assert (after < 0.6 * before) == (rank > 0)


def test_rank_0_is_plain_nf4_without_an_adapter(tmp_path):
    source = tmp_path / "source"
    write_checkpoint(source)
    out = qsvd.quantize(qsvd.Quantize(str(source), out=tmp_path / "out", rank=0))
    records = assert_split_as_stated(source, out)
    assert all(record["before"] == record["after"] for record in records.values())
    assert not list(out.glob("adapter*"))
    assert "adapter" not in (out / "README.md").read_text().split("##", 1)[1]


def test_include_and_exclude_decide_what_is_split_and_what_a_loader_leaves(tmp_path):
    source = tmp_path / "source"
    write_checkpoint(source)
    patterns = {"include": ("*.self_attn.*", "*.up_proj"), "exclude": ("*.0.self_attn.q_proj", "*.o_proj")}
    out = qsvd.quantize(qsvd.Quantize(str(source), out=tmp_path / "out", rank=4, iterations=1, **patterns))
    records = assert_split_as_stated(source, out)
    layers = [["self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj"]] * 2
    layers[1] = ["self_attn.q_proj", *layers[1]]
    assert set(records) == {f"model.layers.{i}.{module}" for i, modules in enumerate(layers) for module in modules}
    config = json.loads((out / "config.json").read_text())
    skipped = set(config["quantization_config"]["llm_int8_skip_modules"])
    everything = {f"model.layers.{i}.mlp.{side}_proj" for i in (0, 1) for side in ("gate", "down")}
    everything |= {
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.o_proj",
        "model.layers.1.self_attn.o_proj",
    }
    assert skipped >= everything | {"lm_head"}
    assert not skipped & set(records)
    assert set(json.loads((out / "adapter_config.json").read_text())["target_modules"]) == set(records)


def test_the_library_is_silent_and_writes_the_bytes_of_the_command(tmp_path, monkeypatch, capfd):
    write_checkpoint(tmp_path / "source")
    capfd.readouterr()
    for folder in ("library", "command"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "library")
    out = qsvd.quantize(qsvd.Quantize("../source", out=Path("out"), rank=4, iterations=1))
    assert capfd.readouterr() == ("", "")
    assert str(out) == "out"
    monkeypatch.chdir(tmp_path / "command")
    assert run(["quantize", "../source", "--out", "out", "--rank", "4", "--iterations", "1"]) == 0
    assert files_of(tmp_path / "library" / "out") == files_of(tmp_path / "command" / "out")


def test_another_folder_gets_the_same_bytes_but_where_it_is_named(tmp_path):
    write_checkpoint(tmp_path / "source")
    options = qsvd.Quantize(str(tmp_path / "source"), out=tmp_path / "one", rank=4, iterations=1)
    one = files_of(qsvd.quantize(options))
    two = files_of(qsvd.quantize(replace(options, out=tmp_path / "two")))
    assert one.keys() == two.keys()
    for name, content in one.items():
        assert two[name] == content.replace(str(tmp_path / "one").encode(), str(tmp_path / "two").encode()), name
    named = {name for name in one if one[name] != two[name]}
    assert named == {"README.md"}


def test_another_seed_gives_another_sketch_and_nearly_the_same_error(tmp_path):
    write_checkpoint(tmp_path / "source", hidden_size=320, intermediate_size=320, num_hidden_layers=1)
    options = qsvd.Quantize(str(tmp_path / "source"), out=tmp_path / "0", rank=4, include=("*.up_proj",), iterations=1)
    runs = [qsvd.quantize(replace(options, out=tmp_path / str(seed), seed=seed)) for seed in (0, 1)]
    adapters = [(out / "adapter_model.safetensors").read_bytes() for out in runs]
    assert adapters[0] != adapters[1]
    errors = [json.loads((out / "errors.jsonl").read_text())["after"]["frobenius"] for out in runs]
    assert errors[0] == pytest.approx(errors[1], rel=0.01)


def test_the_exact_svd_does_not_depend_on_the_seed(tmp_path):
    write_checkpoint(tmp_path / "source", hidden_size=320, intermediate_size=320, num_hidden_layers=1)
    options = qsvd.Quantize(
        str(tmp_path / "source"), out=tmp_path / "0", rank=4, include=("*.up_proj",), iterations=1, svd="exact"
    )
    runs = [qsvd.quantize(replace(options, out=tmp_path / str(seed), seed=seed)) for seed in (0, 1)]
    assert tensors_of(runs[0]).keys() == tensors_of(runs[1]).keys()
    assert (runs[0] / "model.safetensors").read_bytes() == (runs[1] / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("order", "end"), [("svd", "quantize"), ("quantize", "svd")])
def test_more_iterations_never_store_a_larger_error(tmp_path, order, end):
    write_checkpoint(tmp_path / "source", num_hidden_layers=1)
    options = qsvd.Quantize(str(tmp_path / "source"), out=tmp_path / "x", rank=4, order=order, end=end, stop="never")
    errors = []
    for iterations in (2, 6):
        out = qsvd.quantize(replace(options, out=tmp_path / str(iterations), iterations=iterations))
        records = assert_split_as_stated(tmp_path / "source", out)
        errors.append([record["after"]["frobenius"] for record in records.values()])
        assert all(record["iteration"] <= iterations for record in records.values())
    assert all(more <= fewer for fewer, more in zip(*errors, strict=True))
