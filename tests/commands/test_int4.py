"""A model in int4, from the commands: its files, its readers and its exports, and what is refused."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

import qsvd
from qsvd.adapters.adapter import AdapterOptions
from qsvd.adapters.start import new_record, planner_of
from qsvd.cli import run as command
from qsvd.errors import BadInput
from qsvd.files.split_folder import open_split
from qsvd.memory.items import Placement
from qsvd.plan.allocation import residual_bytes
from tests.checkpoints import write_checkpoint

IDS = torch.arange(3, 35).reshape(2, 16)
TIED = {"tie_word_embeddings": False, "hidden_size": 64, "intermediate_size": 128}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "source"
    write_checkpoint(folder, **TIED)
    return folder


@pytest.fixture(scope="module")
def out(source):
    folder = source.with_name("out")
    options = {"rank": 8, "codec": "int4-32", "scales": "mse", "iterations": 2}
    qsvd.quantize(qsvd.Quantize(str(source), out=folder, **options))
    return folder


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits.double()


def off(found, expected):
    return float((found - expected).norm() / expected.norm())


def dense(source, out, dtype=None):
    """The 16-bit model with Q + B A by definition in the place of W; with a dtype, Q is rounded to it."""
    model, split = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), open_split(out)
    tensors = load_file(out / "model.safetensors")
    for name, weight in split.weights.items():
        words, scales = tensors[f"{name}_packed"].long() & 0xFFFFFFFF, tensors[f"{name}_scale"].float()
        codes = torch.stack([words >> 4 * place & 15 for place in range(8)], dim=-1).view(weight["shape"]) - 8
        residual = codes * scales.repeat_interleave(32, dim=1)
        residual = residual if dtype is None else residual.to(dtype).float()
        up, down = (factor.float() for factor in split.factors(name))
        model.get_parameter(name).data = residual + up @ down
    return model


def test_the_config_names_what_is_quantized_and_what_is_not(source, out):
    quantization = json.loads((out / "config.json").read_text())["quantization_config"]
    assert quantization["quant_method"] == "compressed-tensors"
    assert "lm_head" in quantization["ignore"]
    assert quantization["config_groups"]["group_0"]["weights"]["group_size"] == 32
    tensors = load_file(out / "model.safetensors")
    assert {name for name in tensors if name.endswith("_proj.weight")} == set()
    assert sum(name.endswith("weight_packed") for name in tensors) == 14
    assert tensors["lm_head.weight"].dtype == load_file(source / "model.safetensors")["lm_head.weight"].dtype
    readme = (out / "README.md").read_text()
    assert "transformers, peft and compressed-tensors" in readme
    assert "vllm-bnb-plugin" not in readme
    assert "--enable-lora" in readme


def test_qsvd_loads_it_whole_and_offloaded(source, out):
    expected, found = logits(dense(source, out)), logits(qsvd.load(out, device="cpu"))
    assert off(found, expected) < 1e-5
    for pages in ("host", "disk"):
        placed = qsvd.load(out, device="cpu", placement=Placement(resident=0, pages=pages))
        assert torch.equal(logits(placed), found)


def test_the_planner_counts_the_bytes_that_are_loaded_and_stored(out):
    split = open_split(out)
    planned = planner_of(split, torch.bfloat16)(new_record(split, AdapterOptions()))
    loaded = [split.residual(name).num_bytes for name in split.weights]
    assert sum(block.codes + block.scales for block in planned.blocks) == sum(loaded)
    tensors = load_file(out / "model.safetensors")
    stored = [tensor.nbytes for name, tensor in tensors.items() if "_proj.weight" in name]
    assert sum(residual_bytes(split.codec(name), tuple(w["shape"])) for name, w in split.weights.items()) == sum(stored)


def test_the_merged_export_has_the_dtype_of_the_source_and_its_outputs(source, out, tmp_path):
    assert command(["export", str(out), "--to", "merged", "--out", str(tmp_path / "merged")]) == 0
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == transformers.AutoConfig.from_pretrained(source).dtype
    assert off(logits(merged.float()), logits(dense(source, out))) < 0.02
    assert command(["verify", str(out)]) == 0


def test_transformers_and_peft_load_it_without_qsvd(source, out):
    pytest.importorskip("compressed_tensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    split = open_split(out)
    for name, weight in split.weights.items():
        found = model.get_submodule(weight["module"]).base_layer.weight
        assert torch.equal(found, split.residual(name).decode(dtype=torch.bfloat16).float()), name
    expected = logits(dense(source, out, torch.bfloat16))
    assert off(logits(model), expected) < 1e-5
    assert off(logits(qsvd.load(out, device="cpu")), expected) < 0.01, "qsvd decodes to float32"
    alone = transformers.AutoModelForCausalLM.from_pretrained(out, adapter_kwargs={"subfolder": "none"})
    assert off(logits(alone.float()), expected) > 0.05, "the adapter would be missed"


def test_a_table_of_one_group_size_is_the_same_format(source, out, tmp_path):
    table = tmp_path / "table.txt"
    modules = [weight["module"] for weight in open_split(out).weights.values()]
    table.write_text(
        "# qsvd allocation\n" + "".join(f"{module} int4-32 {8 - n % 2}\n" for n, module in enumerate(modules))
    )
    made = qsvd.quantize(qsvd.Quantize(str(source), out=tmp_path / "out", allocation=table, iterations=1))
    quantization = json.loads((made / "config.json").read_text())["quantization_config"]
    assert quantization["quant_method"] == "compressed-tensors"
    table.write_text(table.read_text().replace("int4-32", "int4-64", 1))
    with pytest.raises(BadInput, match=r"int4-32 and int4-64 \(compressed-tensors\) cannot be mixed"):
        qsvd.quantize(qsvd.Quantize(str(source), out=tmp_path / "two", allocation=table))


REFUSED = {
    "groups": (
        {"codec": "int4-128"},
        r"groups of int4-128 do not divide the inputs of 12 layers: .* \(64 inputs\).*; use int4-64, or --",
    ),
    "budget": ({"codec": "int4-32", "budget": "4bits"}, "--codec int4-32 cannot be used with --budget"),
    "head": ({"codec": "int4-32", "head_bits": 8}, "--codec int4-32 cannot be used with --head-bits"),
    "scales": ({"codec": "int4-32", "double_quant": False}, "--codec int4-32 cannot be used with --no-double-quant"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_refused(source, tmp_path, case):
    options, sentence = REFUSED[case]
    with pytest.raises(BadInput, match=sentence):
        qsvd.quantize(qsvd.Quantize(str(source), out=tmp_path / "out", rank=8, **options))


def test_transposed_layers_are_refused_and_experts_are_for_qsvd_alone(tmp_path):
    write_checkpoint(tmp_path / "gpt2", "GPT2LMHeadModel")
    with pytest.raises(BadInput, match=r"compressed-tensors does not replace transformer[.]h[.]0[.]attn"):
        qsvd.quantize(qsvd.Quantize(str(tmp_path / "gpt2"), out=tmp_path / "out", rank=4, codec="int4-32"))
    write_checkpoint(tmp_path / "mixtral", "MixtralForCausalLM")
    made = qsvd.quantize(
        qsvd.Quantize(str(tmp_path / "mixtral"), out=tmp_path / "moe", rank=4, codec="int4-32", iterations=1)
    )
    assert json.loads((made / "config.json").read_text())["quantization_config"]["quant_method"] == "qsvd"
    exact = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "mixtral", dtype=torch.float32)
    assert off(logits(qsvd.load(made, device="cpu")), logits(exact)) < 0.2


def test_layers_without_whole_groups_can_be_excluded(source, tmp_path):
    options = {"rank": 4, "codec": "int4-128", "include": ("*.down_proj",), "iterations": 1}
    made = qsvd.quantize(qsvd.Quantize(str(source), out=tmp_path / "out", **options))
    ignored = json.loads((made / "config.json").read_text())["quantization_config"]["ignore"]
    assert "model.layers.0.mlp.up_proj" in ignored
    assert "model.layers.0.mlp.down_proj" not in ignored
