"""The files around the shards: index, configs, coverage, fingerprint and README of a result."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers

import qsvd
from qsvd.cli import run as qsvd_command
from tests.checkpoints import write_checkpoint
from tests.commands.folders import tensors_of


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """The result of a checkpoint at rank 4."""
    folder = tmp_path_factory.mktemp("split")
    write_checkpoint(folder / "source")
    return quantized(folder / "source", folder / "out")


def quantized(source, out, **options):
    return qsvd.quantize(qsvd.Quantize(str(source), out=out, **({"rank": 4, "iterations": 1} | options))).path


def test_small_shards_have_an_index_that_names_every_tensor_once(tmp_path):
    source = tmp_path / "source"
    write_checkpoint(source, vocab_size=1024)
    out = quantized(source, tmp_path / "out", shard_size="0.1MB")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = {path.name: safetensors.torch.load_file(path) for path in out.glob("model*.safetensors")}
    assert len(files) > 1
    assert index["weight_map"] == {name: file for file, tensors in files.items() for name in tensors}
    total = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
    assert index["metadata"]["total_size"] == total
    assert not (out / "model.safetensors").exists()


@pytest.mark.parametrize("rank", [0, 4])
def test_one_file_has_an_index_next_to_an_adapter_alone(split, tmp_path, rank):
    """vLLM reads every safetensors file of a folder without an index, the adapter too."""
    out = split if rank else quantized(split.parent / "source", tmp_path / "out", rank=0)
    assert (out / "model.safetensors.index.json").exists() == (rank > 0)
    storage = json.loads((out / "config.json").read_text())["quantization_config"]["bnb_4bit_quant_storage"]
    assert storage == ("int8" if rank else "uint8"), "vLLM accepts uint8 alone"


def test_layers_that_vllm_joins_are_named_as_it_names_them(split, tmp_path):
    out = quantized(split.parent / "source", tmp_path / "out", rank=0, exclude=("*.1.self_attn.[qkv]_proj",))
    config = json.loads((out / "config.json").read_text())
    joined = [path for path in config["quantization_config"]["llm_int8_skip_modules"] if "qkv_proj" in path]
    assert joined == ["model.layers.1.self_attn.qkv_proj"]


def test_the_config_is_the_sources_with_the_quantization_added(tmp_path):
    source = tmp_path / "source"
    write_checkpoint(source, dtype=torch.float16)
    config = json.loads((source / "config.json").read_text()) | {"a_key_of_the_future": [1, "ü"]}
    (source / "config.json").write_text(json.dumps(config))
    (source / "tokenizer_config.json").write_text('{"odd":   "spacing"}')
    (source / "LICENSE.txt").write_text("as you like")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    out = quantized(source, tmp_path / "out", double_quant=False)
    result = json.loads((out / "config.json").read_text())
    quantization = result.pop("quantization_config")
    assert result == config
    assert quantization["bnb_4bit_compute_dtype"] == "float16"
    assert quantization["bnb_4bit_use_double_quant"] is False
    assert (out / "tokenizer_config.json").read_bytes() == (source / "tokenizer_config.json").read_bytes()
    assert (out / "LICENSE.txt").read_text() == "as you like"
    assert (out / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ tools }}"


def test_the_coverage_counts_the_elements_that_were_split_and_lists_what_was_left(split, tmp_path):
    source = split.parent / "source"
    out = quantized(source, tmp_path / "out", include=("*.mlp.*",))
    manifest = json.loads((out / "qsvd.json").read_text())
    original = tensors_of(source)
    coverage = manifest["header"]["coverage"]
    assert coverage["weights"] == 6
    assert coverage["elements_split"] == sum(original[name].numel() for name in manifest["weights"]) == 6 * 64 * 128
    assert coverage["elements"] == sum(tensor.numel() for tensor in original.values())
    left = {group["pattern"]: (group["count"], group["elements"]) for group in coverage["left"]}
    assert left["model.layers.*.self_attn.k_proj.weight"] == (2, 2 * 32 * 64)
    assert left["model.embed_tokens.weight"] == (1, 96 * 64)
    assert sum(elements for _, elements in left.values()) == coverage["elements"] - coverage["elements_split"]


def test_the_fingerprint_ties_adapter_and_residual(split, tmp_path):
    with safetensors.safe_open(split / "adapter_model.safetensors", "pt") as file:
        stated = file.metadata()["qsvd_base_fingerprint"]
    manifest = json.loads((split / "qsvd.json").read_text())
    assert manifest["fingerprint"] == stated
    other = quantized(split.parent / "source", tmp_path / "other", rank=5)
    assert json.loads((other / "qsvd.json").read_text())["fingerprint"] != stated


def test_the_manifest_digests_are_sha256_over_the_names_and_bytes_in_the_shard(split):
    manifest, tensors = json.loads((split / "qsvd.json").read_text()), tensors_of(split)
    lines = []
    for name, weight in sorted(manifest["weights"].items()):
        total = hashlib.sha256()
        for key in sorted(key for key in tensors if key == name or key.startswith(f"{name}.")):
            total.update(key.encode() + b"\0" + tensors[key].numpy().tobytes())
        assert weight["residual_sha256"] == total.hexdigest()
        lines.append(f"{name} {total.hexdigest()}\n")
    assert manifest["fingerprint"] == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_the_readme_names_the_folder_and_the_adapter_names_none_so_that_it_can_move(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "source")
    out = qsvd.quantize(qsvd.Quantize("source", out=Path("~/with space/out"), rank=4, iterations=1))
    named = re.search(r'from_pretrained\("([^"]+)"\)', (out / "README.md").read_text())[1]
    assert (Path(named) / "qsvd.json").is_file()
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] is None


def test_tensors_that_the_class_does_not_have_are_copied_named_and_exported(tmp_path, capsys):
    """An extra prediction layer, as DeepSeek-V3 and GLM-4.5 publish one."""
    source, out, merged = (tmp_path / name for name in ("source", "out", "merged"))
    write_checkpoint(source)
    tensors = safetensors.torch.load_file(source / "model.safetensors")
    names = ["eh_proj", "mlp.up_proj", *(f"mlp.experts.{number}.gate_proj" for number in range(3))]
    extra = {f"model.layers.2.{name}.weight": torch.randn(64, 32).bfloat16() for name in names}
    safetensors.torch.save_file(tensors | extra, source / "model.safetensors", metadata={"format": "pt"})
    qsvd.quantize(qsvd.Quantize(str(source), out=out, rank=4, iterations=1))
    assert qsvd_command(["report", str(out)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Copied, since the model has no such tensors: 5 tensors, 10,240 elements: model.layers.2.mlp.exp" in shown
    page = (out / "report.md").read_text()
    assert "\n- `model.layers.2.mlp.experts.*.gate_proj.weight`: 3 tensors, 6,144 elements\n" in page
    assert qsvd_command(["export", str(out), "--to", "merged", "--out", str(merged)]) == 0
    for folder in (out, merged):
        written = tensors_of(folder)
        assert all(torch.equal(written[name], tensor) for name, tensor in extra.items())
    dense = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        ours, plain = (model(tokens).logits for model in (qsvd.load(out), dense))
    assert (ours - plain).abs().max() < 0.02 * plain.abs().max()


def test_nobody_is_told_to_let_bitsandbytes_decode_what_it_may_decode_wrongly(tmp_path, capsys):
    """Its kernel for AVX-512 is wrong where the input features, 96 here, do not divide by 64."""
    source, out = tmp_path / "source", tmp_path / "out"
    write_checkpoint(source, hidden_size=96)
    commands = [["quantize", source, "--out", out, "--rank", 4], ["report", out]]
    commands += [["export", out, "--to", form, "--out", tmp_path / form] for form in ("merged", "peft")]
    for command in commands:
        assert qsvd_command([str(word) for word in command]) == 0
    shown = "".join(capsys.readouterr())
    pages = [path.read_text() for path in tmp_path.rglob("*.md")]
    guide = (Path(qsvd.__file__).parents[1] / "docs" / "guide.md").read_text()
    assert len(pages) == 2
    for text in (shown, *pages, guide):
        assert "dequantize()" not in text
        assert "merge_and_unload" not in text
