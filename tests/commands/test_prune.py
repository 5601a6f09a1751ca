"""`qsvd prune`, and what was trained on a pruned model on the one it was made from: by NumPy, transformers and PEFT."""

import json
import shutil
from functools import cache

import numpy as np
import peft
import pytest
import safetensors.torch
import torch
import transformers

import qsvd
from qsvd.cli import run as command
from qsvd.export import merged as merging
from qsvd.prune import folder as writing
from qsvd.prune.folder import Pruning
from tests.checkpoints import write_checkpoint
from tests.commands.trained_runs import LABELS, factors_of, residual, trained_weights, write_run
from tests.export.cases import files_of
from tests.stops import killed

ROUNDOFF = 2.0**-24 * 64  # of float32, over sums of some numbers
WIDTHS = {"hidden_size": 64, "intermediate_size": 256}
IDS = torch.arange(3, 35).reshape(2, 16)
# PEFT 0.21 reads a name of before transformers 5
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
MLP = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a 16-bit model M in several shards, P without channels, and Q at rank 4."""
    folder = tmp_path_factory.mktemp("prune")
    write_checkpoint(folder / "M", max_shard_size="100KB", dtype=torch.float32, mlp_bias=True, **WIDTHS)
    result = qsvd.prune(folder / "M", out=folder / "P", keep=0.3, shard_size="200KB")
    assert (result.channels, result.kept) == (256, 80)
    assert result.parameters - result.kept_parameters == 2 * (256 - 80) * (3 * 64 + 2)
    qsvd.quantize(qsvd.Quantize(str(folder / "P"), out=folder / "Q", rank=4, iterations=1))
    return folder


def kept_of(folder):
    """Kept channels by block, from the record alone."""
    record = json.loads((folder / "qsvd_pruned.json").read_text())
    return {block: np.array(kept) for block, kept in record["kept"].items()}


def model_of(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def outputs(model):
    with torch.no_grad():
        return next(iter(model(input_ids=IDS).to_tuple()))


def test_plain_transformers_loads_what_the_original_computes_with_zeros_at_removed_channels(made):
    whole, pruned = model_of(made / "M"), model_of(made / "P")
    assert len(list((made / "P").glob("*.safetensors"))) > 1
    assert pruned.config.intermediate_size == 80
    tensors, before = files_of(made / "M"), outputs(whole)
    for block, kept in kept_of(made / "P").items():
        norms = [tensors[f"{block}.mlp.{name}.weight"].double().numpy() for name in MLP]
        product = np.prod([np.linalg.norm(norm, axis=0 if len(norm) == 64 else 1) for norm in norms], axis=0)
        assert sorted(np.argsort(-product)[:80]) == kept.tolist()
        down = whole.get_submodule(f"{block}.mlp.down_proj").weight.data
        down[:, np.setdiff1d(np.arange(256), kept)] = 0
    wanted = outputs(whole)
    assert (wanted - before).abs().max() > 1e-3
    assert (outputs(pruned) - wanted).abs().max() < 1e-5 * wanted.abs().max()


@cache
def changes_of(folder, method, labels=()):
    """A run on Q, and W' - Q - B0 A0 of every weight in float64, by the path of its layer."""
    run = folder / f"{method}{len(labels)}"
    model = write_run(folder / "Q", run, method, labels=labels)
    stored = factors_of(folder / "Q")
    weights = json.loads((folder / "Q" / "qsvd.json").read_text())["weights"]
    start = {w["module"]: residual(folder / "Q", name) + np.matmul(*stored[w["module"]]) for name, w in weights.items()}
    return run, {path: weight - start[path] for path, weight in trained_weights(folder / "Q", run, model).items()}


def placed(change, path, kept, full):
    """A change of a pruned weight as one of the original, by its definition."""
    block, _, name = path.rpartition(".mlp.")
    wanted = np.zeros(full)
    if not block:
        wanted[:] = change
    elif name == "down_proj":
        wanted[:, kept[block]] = change
    else:
        wanted[kept[block]] = change
    return wanted


@pytest.mark.parametrize("method", ["lora", "pissa"])  # beside the components, and in their place
def test_peft_adds_the_change_to_kept_channels_of_the_original_and_zeros_elsewhere(made, tmp_path, method, capsys):
    run, changes = changes_of(made, method)
    words = ["export", run, "--to", "lora", "--original", made / "M", "--out", tmp_path / "L"]
    assert command([str(word) for word in words]) == 0
    assert "checked: logits differ by at most" in capsys.readouterr().out
    before = {name: p.detach().double().numpy() for name, p in model_of(made / "M").named_parameters()}
    found = peft.PeftModel.from_pretrained(model_of(made / "M"), tmp_path / "L")
    assert found.peft_config["default"].base_model_name_or_path == str(made / "M")
    parts = found.base_model.model.named_modules()
    layers = {path: layer for path, layer in parts if hasattr(layer, "base_layer")}
    assert layers.keys() == changes.keys()
    kept = kept_of(made / "P")
    for path, layer in layers.items():
        factors = [layer.lora_B["default"].weight, layer.lora_A["default"].weight]
        up, down = (factor.detach().double().numpy() for factor in factors)
        assert layer.scaling["default"] == 1
        full = before[f"{path}.weight"].shape
        wanted = placed(changes[path], path, kept, full)
        assert np.abs(up @ down - wanted).max() < ROUNDOFF * max(np.abs(wanted).max(), 1)
        assert (up @ down)[wanted == 0].any() == 0, "zeros, not small numbers"


@pytest.mark.parametrize("method", ["lora", "dora", "randlora"])
def test_merged_weights_are_those_of_the_original_with_the_change(made, tmp_path, method):
    run, changes = changes_of(made, method)
    done = qsvd.export(run, to="merged", original=str(made / "M"), out=tmp_path / "E", shard_size="200KB")
    assert done.checked.difference < 1e-4 * done.checked.spread
    before, after, kept = files_of(made / "M"), files_of(tmp_path / "E"), kept_of(made / "P")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        path = name.removesuffix(".weight")
        wanted = tensor.double().numpy()
        if path in changes:
            wanted = wanted + placed(changes[path], path, kept, wanted.shape)
        assert np.abs(after[name].double().numpy() - wanted).max() < ROUNDOFF * max(np.abs(wanted).max(), 1)
    assert json.loads((tmp_path / "E" / "config.json").read_text())["intermediate_size"] == 256
    model_of(tmp_path / "E")


def test_a_classifier_takes_its_head_along(made, tmp_path):
    run, _ = changes_of(made, "lora", LABELS)
    done = qsvd.export(run, to="lora", original=str(made / "M"), out=tmp_path / "L")
    assert done.checked is not None
    head = safetensors.torch.load_file(run / "qsvd_adapter.safetensors")["score.weight"]
    written = safetensors.torch.load_file(tmp_path / "L" / "adapter_model.safetensors")
    assert torch.equal(written["base_model.model.score.weight"], head)
    merged = qsvd.export(run, to="merged", original=str(made / "M"), out=tmp_path / "E")
    assert merged.checked is not None


def test_the_same_run_is_exported_for_the_pruned_model_as_before(made, tmp_path):
    run, changes = changes_of(made, "lora")
    done = qsvd.export(run, to="lora", original=str(made / "P"), out=tmp_path / "L", check=False)
    tensors = safetensors.torch.load_file(done / "adapter_model.safetensors")
    path = "model.layers.1.mlp.up_proj"
    assert tensors[f"base_model.model.{path}.lora_B.weight"].shape == (len(changes[path]), 4)


@pytest.mark.parametrize(
    ("owner", "name", "number"),
    [(Pruning, "important", 2), (merging, "write_stream", 2), (writing, "write_pruned", 1)],
)
def test_a_killed_run_continues_to_the_same_bytes(made, tmp_path, monkeypatch, owner, name, number):
    words = {"out": tmp_path / "P", "keep": 0.3, "shard_size": "200KB"}
    killed(monkeypatch, owner, name, number, lambda: qsvd.prune(made / "M", **words))
    assert not (tmp_path / "P" / "config.json").exists(), "nobody takes it for a model"
    if name == "write_stream":
        monkeypatch.setattr(Pruning, "important", None)  # chosen channels are kept
    qsvd.prune(made / "M", **words)
    assert {p.name: p.read_bytes() for p in (tmp_path / "P").iterdir()} == {
        p.name: p.read_bytes() for p in (made / "P").iterdir()
    }


def test_a_finished_model_is_left_alone_and_checked(made, capsys):
    before = {path: path.stat().st_mtime_ns for path in (made / "P").iterdir()}
    words = ["prune", str(made / "M"), "--out", str(made / "P"), "--keep", "0.3", "--shard-size", "200KB"]
    assert command(words) == 0
    said = capsys.readouterr()
    assert "was complete already" in said.err
    assert "80 of 256 channels kept in each of 2 MLPs (intermediate_size, a multiple of 16)" in said.out
    assert {path: path.stat().st_mtime_ns for path in (made / "P").iterdir()} == before
    assert command(["verify", str(made / "P")]) == 0
    assert command([*words, "--keep", "0.5"]) == 2
    assert "kept_channels 80 there, 128 now" in capsys.readouterr().err


@pytest.fixture
def refused(made, tmp_path, monkeypatch, capsys):
    """Run a command that must be refused before it makes anything; the sentence."""
    monkeypatch.chdir(made)

    def refuse(*words):
        capsys.readouterr()
        assert command([*map(str, words), "--out", str(tmp_path / "never")]) == 2
        (sentence,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("qsvd: ")]
        assert not (tmp_path / "never").exists()
        return sentence.removeprefix("qsvd: ")

    return refuse


def test_what_cannot_be_pruned_is_refused(made, refused, tmp_path):
    assert refused("prune", "M", "--keep", 0) == "--keep 0.0 is not a number above 0 and below 1"
    assert "0.99 of 256 channels, rounded to a multiple of 32, keeps all" in refused("prune", "M", "--keep", 0.99)
    assert "P is pruned already (qsvd_pruned.json): prune " in refused("prune", "P")
    assert "this checkpoint is already quantized" in refused("prune", "Q")
    write_checkpoint(tmp_path / "gpt", "GPT2LMHeadModel")
    assert "GPT2LMHeadModel is none of these: none of its numbers" in refused("prune", tmp_path / "gpt")
    shutil.copytree(made / "M", tmp_path / "broken")
    shard = next(p for p in (tmp_path / "broken").glob("*.safetensors") if p.stat().st_size > 50_000)
    tensors = {name: tensor * float("nan") for name, tensor in safetensors.torch.load_file(shard).items()}
    safetensors.torch.save_file(tensors, shard, metadata={"format": "pt"})
    assert f"{len(tensors)} tensors have values that are NaN or infinite" in refused("prune", tmp_path / "broken")


def test_what_cannot_be_recovered_is_refused(made, refused, tmp_path):
    run, _ = changes_of(made, "lora")
    write_checkpoint(tmp_path / "other", dtype=torch.float32, seed=1, **WIDTHS)
    said = refused("export", run, "--to", "lora", "--original", tmp_path / "other")
    assert said == (
        f"--original {tmp_path / 'other'} is neither {made / 'M'}, which qsvd prune removed channels from, nor "
        f"{made / 'P'}, which is the result: its fingerprint differs; give one of them, unchanged"
    )
    gains, _ = changes_of(made, "dora")
    assert "scales the rows" in refused("export", gains, "--to", "lora", "--original", "M")
    shutil.copytree(made / "Q", tmp_path / "Q")
    record = tmp_path / "Q" / "qsvd_pruned.json"
    record.write_text(record.read_text().replace('"channels": 256', '"channels": 257'))
    code = command(["export", str(run), "--base", str(tmp_path / "Q"), "--to", "lora", "--original", "M", "--out", "x"])
    assert code == 1, "damaged"
