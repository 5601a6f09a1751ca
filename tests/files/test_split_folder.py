"""A result read back: residual and factors as bitsandbytes and safetensors see the files."""

import json
import shutil

import bitsandbytes.functional as bitsandbytes
import pytest
import safetensors.torch
import torch

import qsvd
from qsvd.errors import BadInput, Damaged
from qsvd.files.split_folder import open_split
from tests.checkpoints import write_checkpoint
from tests.sealed import reseal, without_digests

NAME = "model.layers.1.mlp.down_proj.weight"
PREFIX = "base_model.model.model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    write_checkpoint(folder / "source", hidden_size=64, intermediate_size=128)
    for rank in (0, 4):
        qsvd.quantize(qsvd.Quantize(str(folder / "source"), out=folder / str(rank), rank=rank, shard_size="100KB"))
    return folder


def decoded(folder):
    tensors = safetensors.torch.load_file(
        folder / json.loads((folder / "qsvd.json").read_text())["weights"][NAME]["file"]
    )
    mine = {key: tensor for key, tensor in tensors.items() if key.startswith(f"{NAME}.")}
    state = bitsandbytes.QuantState.from_dict(mine, device="cpu")
    state.dtype = torch.float32
    return bitsandbytes.dequantize_4bit(tensors[NAME], state)


def test_residual_factors_and_dense_matrix_are_those_of_the_files(results):
    split = open_split(results / "4")
    assert len(split.weights) == 14
    residual = decoded(results / "4")
    assert torch.equal(split.residual(NAME).decode(), residual)
    adapter = safetensors.torch.load_file(results / "4" / "adapter_model.safetensors")
    up, down = split.factors(NAME)
    assert torch.equal(up, adapter[f"{PREFIX}.lora_B.weight"])
    assert torch.equal(down, adapter[f"{PREFIX}.lora_A.weight"])
    exact = residual.double() + up.double() @ down.double()
    roundoff = 2**-22 * (residual.abs() + up.float().abs() @ down.float().abs())  # 4 products and sums of float32
    assert (split.dense(NAME) - exact).abs().le(roundoff).all()


def test_rank_0_has_no_factors_and_its_dense_matrix_is_the_residual(results):
    split = open_split(results / "0")
    assert split.factors(NAME) is None
    assert torch.equal(split.dense(NAME), decoded(results / "0"))


def test_an_adapter_of_another_base_is_refused(results, tmp_path):
    out = without_digests(shutil.copytree(results / "4", tmp_path / "out"))
    path = out / "adapter_model.safetensors"
    adapter = safetensors.torch.load_file(path)
    safetensors.torch.save_file(adapter, path, metadata={"format": "pt", "qsvd_base_fingerprint": "0" * 64})
    with pytest.raises(ValueError, match=r"belongs to another quantized model than .*: its fingerprint differs"):
        open_split(out)
    safetensors.torch.save_file(adapter, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="belongs to another quantized model"):
        open_split(out)


def test_a_folder_that_is_no_result_is_refused(results):
    with pytest.raises(ValueError, match=r"source is not a quantized model: it has no qsvd\.json"):
        open_split(results / "source")


Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
DAMAGES = {
    "no fingerprint": (
        lambda m: m.pop("fingerprint"),
        r"is damaged \(copy .*, or quantize again\): fingerprint is missing$",
    ),
    "no weights": (lambda m: m.pop("weights"), "weights is missing$"),
    "no format": (lambda m: m.pop("format"), "has format None; "),
    "a weight is gone": (lambda m: m["weights"].pop(Q_PROJ), "its fingerprint is not that of its weights; "),
    "no rank": (lambda m: m["weights"][Q_PROJ].pop("rank"), f"weights.{Q_PROJ}.rank is missing$"),
    "another rank": (
        lambda m: m["weights"][Q_PROJ].update(rank=0),
        "have other shapes for .*0.self_attn.q_proj.lora_A",
    ),
    "a rank above the size": (lambda m: m["weights"][Q_PROJ].update(rank=65), f"the ranks of {Q_PROJ} are above"),
    "another shape": (lambda m: m["weights"][Q_PROJ].update(shape=[64]), "shape is .64., not a list of two positive"),
    "another module": (
        lambda m: m["weights"][Q_PROJ].update(module=NAME.removesuffix(".weight")),
        "it has model.layers.1.mlp.down_proj twice; ",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_manifest_is_refused(results, tmp_path, damage):
    change, sentence = DAMAGES[damage]
    out = shutil.copytree(results / "4", tmp_path / "out")
    plain = shutil.copytree(out, tmp_path / "plain")
    (plain / "qsvd.json").write_text(json.dumps({**json.loads((out / "qsvd.json").read_text()), "header": {}}))
    with pytest.raises(Damaged, match=r"qsvd\.json is damaged: its digest differs; copy the folder again"):
        open_split(plain)
    reseal(out / "qsvd.json", change)
    with pytest.raises(BadInput, match=sentence):
        open_split(out)


@pytest.mark.parametrize("text", ["[]", "{", '{"weight_map": 3}'])
@pytest.mark.parametrize("file", ["qsvd.json", "model.safetensors.index.json"])
def test_a_manifest_or_index_that_is_something_else_is_refused(results, tmp_path, file, text):
    out = without_digests(shutil.copytree(results / "4", tmp_path / "out"))
    (out / file).write_text(text)
    with pytest.raises(BadInput, match=file):
        open_split(out)


@pytest.mark.parametrize("config", [[], {"quant_method": "bitsandbytes"}, {"bnb_4bit_compute_dtype": "float99"}])
def test_a_config_without_the_dtype_of_the_weights_is_refused(results, tmp_path, config):
    out = without_digests(shutil.copytree(results / "4", tmp_path / "out"))
    reseal(out / "config.json", lambda fields: fields.update(quantization_config=config))
    with pytest.raises(Damaged, match=r"config\.json is damaged: quantization_config has no dtype"):
        _ = open_split(out).stored_dtype
