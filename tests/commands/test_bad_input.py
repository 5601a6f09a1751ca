"""What cannot be done is refused in one sentence with an exit code, before any work; 2 is bad input, 3 does not fit."""

import json
import re
import shutil

import pytest
import safetensors.torch
import torch

from qsvd.cli import run
from qsvd.options import Quantize
from qsvd.prepare.quantize import prepare_quantize
from tests.checkpoints import write_checkpoint

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    write_checkpoint(folder / "one")
    write_checkpoint(folder / "shards", max_shard_size="20KB")
    assert len(list((folder / "shards").glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def model(saved, tmp_path):
    return shutil.copytree(saved / "one", tmp_path / "model")


@pytest.fixture
def shards(saved, tmp_path):
    return shutil.copytree(saved / "shards", tmp_path / "shards")


@pytest.fixture
def refused(tmp_path, capsys):
    """Run `qsvd quantize MODEL --out OUT`, which must be refused; the sentence. OUT must not come into being."""

    def quantize(model, *flags, code=2, out=tmp_path / "out", makes_folder=False):
        capsys.readouterr()
        was_there = out.exists()
        assert run(["quantize", str(model), "--out", str(out), "--rank", "4", *map(str, flags)]) == code
        shown = capsys.readouterr()
        assert shown.out == ""
        *progress, sentence = shown.err.splitlines()
        assert sentence.startswith("qsvd: ")
        assert all(re.fullmatch(r"\d+/\d+ weights, .*", line) for line in progress)
        assert makes_folder or (not progress and out.exists() == was_there)
        return sentence.removeprefix("qsvd: ")

    return quantize


def edit(folder, change):
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def edit_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def test_no_config(refused, model):
    (model / "config.json").unlink()
    assert refused(model) == f"no config.json in {model}; give the folder of a transformers model"


def test_a_shard_is_missing(refused, shards):
    file = sorted(shards.glob("model-*.safetensors"))[1]
    count = len(list(shards.glob("model-*.safetensors")))
    file.unlink()
    assert refused(shards) == f"1 of {count} shards of {shards} are missing: {file.name}"


def test_a_shard_is_truncated(refused, shards):
    file = sorted(shards.glob("model-*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-1])
    assert re.match(rf"{file} is truncated: ", refused(shards))


def test_a_shard_has_a_wrong_header(refused, shards):
    file = sorted(shards.glob("model-*.safetensors"))[1]
    content = file.read_bytes()
    file.write_bytes(content[:8] + b"[" + content[9:])
    assert refused(shards).startswith(f"{file} is not a safetensors file: its header is not valid JSON")


def test_a_tensor_is_missing(refused, model):
    edit(model, lambda tensors: tensors.pop(Q_PROJ))
    assert refused(model) == (
        f"{model} is not the LlamaForCausalLM of its config: 1 tensors that config.json describes are in no weight "
        f"file: {Q_PROJ}"
    )


def test_a_tensor_has_another_shape(refused, model):
    edit(model, lambda tensors: tensors.update({Q_PROJ: torch.zeros(32, 16, dtype=torch.bfloat16)}))
    assert refused(model).endswith(
        f"1 tensors have another shape than in config.json: {Q_PROJ} is [32, 16] instead of [64, 64]"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_holds_nan_or_infinity(refused, model, value):
    def damage(tensors):
        tensors[Q_PROJ][3, 5:8] = value

    edit(model, damage)
    assert refused(model) == (
        f"{model}: 1 tensors have values that are NaN or infinite: {Q_PROJ} (3 of 4096); repair the checkpoint"
    )


def test_copied_tensors_hold_nan_or_infinity(refused, model):
    def damage(tensors):
        tensors["model.embed_tokens.weight"][7, 1:3] = float("inf")
        tensors["model.norm.weight"][3] = float("nan")

    edit(model, damage)
    assert refused(model) == (
        f"{model}: 2 tensors have values that are NaN or infinite: model.embed_tokens.weight (2 of 6144), "
        "model.norm.weight (1 of 64); repair the checkpoint"
    )


def test_tensors_that_the_config_ties_have_other_values(refused, model):
    tied = {"tie_word_embeddings": True}
    edit_config(model, **tied)
    assert refused(model) == (
        f"{model}: model.embed_tokens.weight and lm_head.weight have other values, but config.json says that they are "
        "one tensor; set tie_word_embeddings to false there, or remove the wrong tensor"
    )
    edit(model, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    prepare_quantize(Quantize(str(model), model / "out", rank=4))  # equal ones are not refused


QUANTIZED = {
    "bitsandbytes": ({f"{Q_PROJ}.absmax": torch.ones(16)}, "bitsandbytes"),
    "GPTQ": ({"model.layers.1.self_attn.q_proj.g_idx": torch.ones(16, dtype=torch.int32)}, "GPTQ"),
    "AWQ": ({"model.layers.1.self_attn.q_proj.qzeros": torch.ones(16, dtype=torch.int32)}, "AWQ"),
    "uint8": ({Q_PROJ: torch.zeros(512, 1, dtype=torch.uint8)}, "U8"),
}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_checkpoint_that_is_already_quantized(refused, model, kind):
    tensors, word = QUANTIZED[kind]
    edit(model, lambda present: present.update(tensors))
    sentence = refused(model)
    assert sentence.startswith(f"this checkpoint is already quantized: 1 {'weights' if kind == 'uint8' else 'tensors'}")
    assert f"such as {next(iter(tensors))} are {word}" in sentence


def test_a_checkpoint_whose_config_says_that_it_is_quantized(refused, model):
    edit_config(model, quantization_config={"quant_method": "awq", "bits": 4})
    assert "already quantized: config.json has a quantization_config with quant_method 'awq'" in refused(model)


def test_a_rank_above_the_shorter_side_names_the_weights_and_the_limit(refused, model):
    assert refused(model, "--rank", 33) == (
        "--rank 33 is above the shorter side of 4 weights: model.layers.0.self_attn.k_proj [32, 64], "
        "model.layers.0.self_attn.v_proj [32, 64], model.layers.1.self_attn.k_proj [32, 64], "
        "model.layers.1.self_attn.v_proj [32, 64]; give at most 32, or --exclude them"
    )


def test_the_highest_rank_that_is_named_is_accepted(model, tmp_path, capsys):
    assert run(["quantize", str(model), "--out", str(tmp_path / "out"), "--rank", "32"]) == 0
    assert "rank 32" in capsys.readouterr().out


def test_no_iterations(refused, model):
    assert refused(model, "--iterations", 0) == "--iterations 0 is below 1"


def test_an_unknown_pattern(refused, model):
    sentence = refused(model, "--include", "*.q_proj", "*.query")
    assert sentence.startswith("no linear layer in the blocks matches '*.query'; patterns are globs on paths such as")


def test_nothing_left_to_split(refused, model):
    assert refused(model, "--exclude", "*").startswith(
        "LlamaForCausalLM has no linear layer inside repeated blocks left"
    )


@pytest.mark.parametrize("size", ["5X", "5PB", "", "GB", "-5GB", "99KB", "0.00001GB"])
def test_a_shard_size_that_is_none(refused, model, size):
    sentence = refused(model, f"--shard-size={size}")
    refusal = "is not a size of at least 100 KB: give a number of GB, or one and KB, MB, GB or TB"
    assert sentence == f"--shard-size {size!r} {refusal}"


@pytest.mark.parametrize("device", ["gpu", "meta", "mps", "cpu:x", ""])
def test_a_device_of_no_known_kind(refused, model, device):
    assert refused(model, f"--device={device}") == f"--device {device!r} is not one of auto, cpu, cuda, cuda:N"


def test_a_cuda_device_that_is_not_there(refused, model):
    count = torch.cuda.device_count()
    assert refused(model, f"--device=cuda:{count}") == (
        f"--device 'cuda:{count}' does not exist: torch finds {count} CUDA GPUs"
    )


@pytest.fixture
def small_disk(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10**9, 10**9 - 9999, 9999))


@pytest.mark.usefixtures("small_disk")
def test_too_little_disk_is_known_before_any_work(refused, model, tmp_path):
    sentence = refused(model, code=3, makes_folder=True)
    assert re.match(r".*out needs 0\.00 GB more disk space \(.* has 0\.00 GB free\); free some, or give", sentence)
    assert not list(tmp_path.rglob("*.factors"))


@pytest.mark.usefixtures("small_disk")
def test_a_dry_run_tells_of_too_little_disk_too(refused, model):
    assert "more disk space" in refused(model, "--dry-run", code=3)


@pytest.mark.usefixtures("small_disk")
def test_too_little_disk_leaves_no_folder(refused, model):
    refused(model, code=3)


def test_after_too_little_disk_a_lower_rank_is_accepted_as_the_sentence_advises(refused, model, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10**9, 10**9 - 9999, 9999))
    assert "a lower --rank" in refused(model, code=3, makes_folder=True)
    monkeypatch.undo()
    assert run(["quantize", str(model), "--out", str(tmp_path / "out"), "--rank", "2"]) == 0


@pytest.mark.parametrize("command", [["quantize", "--out"], ["eval", "--data"]])
def test_code_in_a_checkpoint_is_neither_run_nor_asked_about(model, tmp_path, monkeypatch, capsys, command):
    edit_config(model, model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    (model / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (tmp_path / "t.jsonl").write_text('{"text": "a"}')
    name, flag = command
    path = tmp_path / ("t.jsonl" if name == "eval" else "out")
    assert run([name, str(model), flag, str(path)]) == 2
    shown = capsys.readouterr()
    assert "Do you wish to run" not in shown.out + shown.err
    assert not (tmp_path / "ran").exists()
