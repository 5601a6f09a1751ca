"""4-bit weights for servers: codes and scales by NumPy in float64 on the files, then stock transformers."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import qsvd
from qsvd.cli import run as command
from qsvd.errors import BadInput
from qsvd.export import compressed
from qsvd.export.compressed import CompressedForm, write_compressed
from tests.commands.folders import files_of as bytes_of
from tests.commands.trained_runs import write_run
from tests.export.cases import as_model, dense, files_of, make_base, outputs, perturbed

FORM = CompressedForm("CAUSAL_LM")
ROUNDOFF = 1e-5  # of float32 sums, relative to a norm
BF16 = 2.0**-8  # transformers rounds the product of number and scale to bfloat16


@pytest.fixture(scope="module")
def nf4(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("nf4"))


@pytest.fixture(scope="module")
def int4(tmp_path_factory):
    folder = make_base(tmp_path_factory.mktemp("int4"), codec="int4-32")
    write_run(folder / "out", folder / "run")
    return folder


def decoded(tensors, name):
    """Number times scale by docs/format.md, float64."""
    rows, columns = tensors[f"{name}_shape"].tolist()
    words = tensors[f"{name}_packed"].numpy().view(np.uint32)
    numbers = (
        np.stack([words >> 4 * place & 15 for place in range(8)], axis=-1).reshape(rows, columns).astype(float) - 8
    )
    scales = tensors[f"{name}_scale"].double().numpy()
    return numbers * scales.repeat(columns // scales.shape[1], axis=1)


def test_merged_weights_are_rounded_with_less_error_than_by_the_largest_magnitude_and_the_error_is_said(nf4, tmp_path):
    trained = perturbed(nf4 / "out", gains=True)
    done = write_compressed(as_model(nf4 / "out", trained), tmp_path / "x", FORM)
    tensors, model = files_of(tmp_path / "x"), transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    squares, norms = [], []
    for weight in done.weights:
        exact, found = dense(nf4 / "out", weight.name, trained[weight.name]), decoded(tensors, weight.name)
        squares.append(((found - exact) ** 2).sum())
        norms.append((exact**2).sum())
        assert weight.error == pytest.approx(squares[-1] ** 0.5, abs=ROUNDOFF * norms[-1] ** 0.5)
        groups = exact.reshape(-1, done.group)
        scales = np.abs(groups).max(axis=1, keepdims=True) / 7.5
        plain = (groups - scales * np.clip(np.round(groups / scales), -8, 7)) ** 2
        assert squares[-1] < plain.sum()
        loaded = model.get_parameter(weight.name).detach().double().numpy()
        assert np.abs(loaded - found).max() <= BF16 * np.abs(found).max()
    assert done.relative_error == pytest.approx((sum(squares) / sum(norms)) ** 0.5, rel=ROUNDOFF)
    assert (len(done.weights), done.group, done.rank, done.left) == (14, 64, 0, ())
    assert done.worst.relative_error == max(weight.relative_error for weight in done.weights)
    source = files_of(nf4 / "source")
    assert all(torch.equal(tensors[name], source[name]) for name in source.keys() - trained.keys())


def test_an_int4_residual_is_kept_to_the_byte_and_stock_transformers_adds_what_was_trained(int4, tmp_path, capsys):
    arguments = ["export", int4 / "run", "--to", "compressed-tensors", "--out", tmp_path / "x"]
    assert command([str(argument) for argument in arguments]) == 0
    said = capsys.readouterr()
    assert "the residual is not rounded again; next to it is an adapter of rank 4: relative error 0.0000" in said.out
    assert "checked: logits differ by at most" in said.out
    assert "--lora-modules" in said.out
    assert "qsvd eval" in said.err
    for path in (int4 / "out").glob("model*.safetensors"):
        before, after = load_file(path), load_file(tmp_path / "x" / path.name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "x", dtype=torch.float32)
    exact = outputs(qsvd.load(int4 / "out", adapter=int4 / "run", device="cpu", dtype=torch.float32))
    assert (outputs(model) - exact).norm() < 0.01 * exact.norm(), "which decodes to float32"
    assert (tmp_path / "x" / "model.safetensors.index.json").is_file(), "vLLM reads every file without an index"


def test_over_int4_what_no_lora_can_say_is_rounded_again(int4, tmp_path):
    trained = perturbed(int4 / "out", gains=True)
    done = write_compressed(as_model(int4 / "out", trained), tmp_path / "x", FORM)
    assert done.rank == 0
    assert 0.05 < done.relative_error < 0.15


class Stop(Exception):
    """A kill."""


def test_a_killed_export_goes_on_with_the_next_weight_to_the_same_bytes(nf4, tmp_path, monkeypatch):
    model = as_model(nf4 / "out", perturbed(nf4 / "out"))
    write_compressed(model, tmp_path / "whole", FORM)
    write, written = compressed.write_stream, []

    def dying(path, *arguments):
        if len(written) == 5:
            raise Stop
        written.append(path)
        write(path, *arguments)

    monkeypatch.setattr(compressed, "write_stream", dying)
    with pytest.raises(Stop):
        write_compressed(model, tmp_path / "x", FORM)
    monkeypatch.undo()
    times = {path: path.stat().st_mtime_ns for path in written}
    other = as_model(nf4 / "out", perturbed(nf4 / "out", seed=1))
    with pytest.raises(BadInput, match="x was written with other options: the run changed"):
        write_compressed(other, tmp_path / "x", FORM)
    assert {path: path.stat().st_mtime_ns for path in written} == times
    write_compressed(model, tmp_path / "x", FORM)
    assert bytes_of(tmp_path / "x") == bytes_of(tmp_path / "whole")


def layers(**shapes):
    weights = {f"{path}.weight": {"module": path, "shape": shape} for path, shape in shapes.items()}
    modules = {name: weight["module"] for name, weight in weights.items()}
    return SimpleNamespace(split=SimpleNamespace(weights=weights), modules=lambda: modules)


@pytest.mark.parametrize(("widths", "group", "left"), [((256, 384), 128, 0), ((256, 96), 32, 0), ((192, 688), 64, 1)])
def test_the_largest_group_that_divides_all_inputs_is_taken_and_layers_without_one_stay(widths, group, left):
    codec, others = compressed._codec(layers(q=(8, widths[0]), down=(8, widths[1])))
    assert (codec.block_size, others) == (group, ("down",) * left)


def test_what_compressed_tensors_does_not_replace_is_refused():
    with pytest.raises(
        BadInput, match=r"no layer has inputs that divide by 32, the smallest group .*: q, k; use --to m"
    ):
        compressed._codec(layers(q=(8, 48), k=(8, 16)))
    model = layers(expert=(8, 64))
    model.split.weights["expert.weight"]["sources"] = []
    with pytest.raises(
        BadInput, match=r"1 weights are experts, or layers that are not a plain nn.Linear, .*: expert; use"
    ):
        compressed._codec(model)


def test_a_layer_that_stays_in_16_bits_is_named_in_the_config(nf4, tmp_path, monkeypatch):
    model = as_model(nf4 / "out", perturbed(nf4 / "out"))
    kept = "model.layers.0.mlp.down_proj"
    monkeypatch.setattr(compressed, "_codec", lambda _: (compressed.Int4(64), (kept,)))
    write_compressed(model, tmp_path / "x", FORM)
    ignored = json.loads((tmp_path / "x" / "config.json").read_text())["quantization_config"]["ignore"]
    assert {kept, "lm_head", "score"} <= {*ignored}
    assert files_of(tmp_path / "x")[f"{kept}.weight"].dtype == torch.bfloat16
    assert "model.layers.1.mlp.down_proj" not in ignored
