"""From a model in FP8 or MXFP4 qsvd makes what it makes from the 16-bit model that transformers decodes."""

import json

import pytest
import safetensors.torch
import torch
import transformers

import qsvd
from qsvd.cli import run as qsvd_command
from qsvd.files.source import open_checkpoint
from qsvd.prepare.models import find_model, load_model
from tests.checkpoints import write_checkpoint
from tests.commands.folders import components_of, tensors_of
from tests.published import dequantized, fp8_tensors, publish, same, write_published

SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}


def test_a_model_in_fp8_becomes_what_its_16_bit_model_becomes(tmp_path, capsys):
    """As Qwen publishes it: scales in bfloat16."""
    source, dense = tmp_path / "source", tmp_path / "dense"
    write_checkpoint(source, "Qwen3ForCausalLM", num_hidden_layers=1, **SIZES)
    publish(source, "fp8", scale_dtype=torch.bfloat16)
    model = dequantized(source)
    model.config.quantization_config = None
    transformers.Qwen3ForCausalLM(model.config).to(torch.bfloat16).save_pretrained(dense)  # no word of FP8
    written = safetensors.torch.load_file(dense / "model.safetensors")
    state = {name: tensor for name, tensor in model.state_dict().items() if name in written}
    safetensors.torch.save_file(state, dense / "model.safetensors", metadata={"format": "pt"})
    outs = [
        qsvd.quantize(qsvd.Quantize(str(folder), out=tmp_path / f"out-{folder.name}", rank=4, iterations=1))
        for folder in (source, dense)
    ]
    for read in (tensors_of, components_of):
        ours, theirs = map(read, outs)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    config = json.loads((outs[0] / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "bitsandbytes"
    assert (outs[0] / "errors.jsonl").read_bytes() == (outs[1] / "errors.jsonl").read_bytes()
    merged = tmp_path / "merged"
    assert qsvd_command(["export", str(outs[0]), "--to", "merged", "--out", str(merged)]) == 0
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    assert {tensor.dtype for tensor in tensors_of(merged).values()} == {torch.bfloat16}
    capsys.readouterr()
    assert qsvd_command(["plan", str(source), "--gpu", "8GB", "--host", "8GB"]) == 0
    assert "fits" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["DeepseekV3", "GptOss"])
def test_eval_and_generate_load_what_transformers_decodes(tmp_path, name):
    write_published(tmp_path, name)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    ours = load_model(find_model(str(tmp_path), None), torch.device("cpu"), torch.bfloat16)
    theirs = dequantized(tmp_path)
    assert type(ours) is type(theirs)
    assert ours.generation_config.eos_token_id == 7
    state, wanted = ours.state_dict(), theirs.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in state.items())
    with torch.no_grad():
        logits = [model.eval()(torch.arange(9)[None]).logits for model in (ours, theirs)]
    assert torch.equal(*logits)


def test_a_model_with_cut_blocks_generates(tmp_path):
    """transformers refuses it: 271 rows are 2.1 blocks of 128."""
    write_checkpoint(tmp_path, "Qwen3ForCausalLM", **SIZES | {"intermediate_size": 271})
    publish(tmp_path, "fp8")
    with pytest.raises(RuntimeError, match="automatic conversion of the weights"):
        dequantized(tmp_path)
    model = load_model(find_model(str(tmp_path), None), torch.device("cpu"), torch.float32)
    checkpoint = open_checkpoint(str(tmp_path))
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(model.get_parameter(name), checkpoint.read(name).float())


def test_copied_tensors_are_written_decoded(tmp_path):
    """Experts that are left out, and DeepSeek's extra prediction layer, which transformers does not have."""
    extra = fp8_tensors("model.layers.2.eh_proj.weight", torch.randn(256, 512))
    for name in ("DeepseekV3", "GptOss"):
        source = tmp_path / name
        write_published(source, name)
        if name == "DeepseekV3":
            path = source / "model.safetensors"
            safetensors.torch.save_file(safetensors.torch.load_file(path) | extra, path, metadata={"format": "pt"})
        options = qsvd.Quantize(str(source), out=tmp_path / f"{name}-out", rank=4, iterations=1, exclude=("*experts*",))
        out = qsvd.quantize(options)
        checkpoint, written = open_checkpoint(str(source)), tensors_of(out)
        split = json.loads((out / "qsvd.json").read_text())["weights"]
        copied = checkpoint.tensors.keys() - split.keys()
        assert any("experts" in copy for copy in copied)
        for copy in copied:
            assert same(written[copy], checkpoint.read(copy)), copy
        assert not [left for left in written if left.endswith(("scale_inv", "_blocks", "_scales"))]
        assert ("model.layers.2.eh_proj.weight" in (out / "report.md").read_text()) == (name == "DeepseekV3")
