"""The LoRA on the original weights, judged by plain PEFT on the plain original and by float64 NumPy."""

import json
import shutil

import numpy as np
import peft
import pytest
import safetensors
import safetensors.torch
import torch
import transformers

from qsvd.export import lora as export_lora
from qsvd.export.lora import Target, difference, write_lora
from qsvd.export.trained import Trained
from qsvd.files.source import open_checkpoint
from tests.checkpoints import write_checkpoint
from tests.export.cases import (
    EPS32,
    as_model,
    assert_same_outputs,
    dense,
    exact_outputs,
    files_of,
    make_base,
    outputs,
    perturbed,
    products,
    residual,
)
from tests.sealed import without_digests

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT 0.21 asks for it


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("llama"), dtype=torch.float32)


def test_plain_peft_on_the_original_differs_from_the_trained_model_by_what_the_split_lost(llama, tmp_path):
    trained = perturbed(llama / "out")
    original = open_checkpoint(str(llama / "source"))
    target = Target(base=str(llama / "source"), task="CAUSAL_LM", original=original)
    result = write_lora(as_model(llama / "out", trained), tmp_path / "x", target)
    source, stored = files_of(llama / "source"), factors_of(llama)
    moved, lost = {}, {}
    for name, weight in trained.items():
        w = source[name].double().numpy()
        moved[name.removesuffix(".weight")] = w + products(weight, stored[name])[0]
        lost[name] = (
            w - residual(llama / "out", name) - stored[name][0].double().numpy() @ stored[name][1].double().numpy()
        )
        left = moved[name.removesuffix(".weight")] - dense(llama / "out", name, weight)
        np.testing.assert_allclose(left, lost[name], atol=1e-12)  # the algebra itself
    model = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(llama / "source"), tmp_path / "x"
    )
    assert_same_outputs(model, *exact_outputs(llama / "source", moved))
    assert result.is_measured
    assert [weight.rank for weight in result.weights] == [8] * 14
    for weight in result.weights:
        assert weight.error == pytest.approx(np.linalg.norm(lost[weight.name]), rel=1e-4)
        assert weight.norm == pytest.approx(source[weight.name].double().norm().item(), rel=1e-6)
        assert weight.relative_error == weight.error / weight.norm
    total = np.sqrt(sum(np.linalg.norm(e) ** 2 for e in lost.values()))
    norm = np.sqrt(sum(source[name].double().norm().item() ** 2 for name in lost))
    assert result.relative_error == pytest.approx(total / norm, rel=1e-4)


def factors_of(folder):
    """B0 and A0 of every weight as safetensors reads them."""
    tensors = safetensors.torch.load_file(folder / "out" / "adapter_model.safetensors")
    paths = {key.removeprefix("base_model.model.").rsplit(".", 2)[0] for key in tensors}
    return {f"{p}.weight": tuple(tensors[f"base_model.model.{p}.lora_{x}.weight"] for x in "BA") for p in paths}


def test_without_the_original_the_recorded_errors_are_stated(llama, tmp_path):
    trained = perturbed(llama / "out")
    model = as_model(llama / "out", trained)
    result = write_lora(model, tmp_path / "x", Target("somewhere", None))
    original = open_checkpoint(str(llama / "source"))
    measured = write_lora(model, tmp_path / "y", Target("somewhere", None, original))
    assert not result.is_measured
    assert result.relative_error == pytest.approx(measured.relative_error, rel=1e-4)
    assert {w.name: w.error for w in result.weights} == pytest.approx(
        {w.name: w.error for w in measured.weights}, rel=1e-4
    )
    tensors = [safetensors.torch.load_file(tmp_path / f / "adapter_model.safetensors") for f in "xy"]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


def test_lower_ranks_are_filled_up_so_that_no_tool_needs_a_pattern(llama, tmp_path):
    trained = perturbed(llama / "out", added=(0, 3))
    stored = factors_of(llama)
    same, *_ = trained
    trained[same] = Trained(*(factor.float() for factor in stored[same]))
    result = write_lora(as_model(llama / "out", trained), tmp_path / "x", Target("b", "CAUSAL_LM"))
    assert sorted({weight.rank for weight in result.weights}) == [0, 8, 11]
    assert result.rank == 11
    config = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (11, 11, {}, {})
    assert config["base_model_name_or_path"] == "b"
    written = safetensors.torch.load_file(tmp_path / "x" / "adapter_model.safetensors")
    assert not any(same.removesuffix("weight") in key for key in written), "what did not change is left out"
    trained.pop(same)
    for name, weight in trained.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        up, down = (written[f"{prefix}.lora_{letter}.weight"].double().numpy() for letter in "BA")
        assert up.shape[1] == down.shape[0] == 11
        exact, size = products(weight, stored[name])
        assert np.linalg.norm(up @ down - exact) <= 4 * EPS32 * size


def test_an_untrained_adapter_is_a_lora_of_zeros(llama, tmp_path):
    trained = {name: Trained(*(f.float() for f in factors)) for name, factors in factors_of(llama).items()}
    result = write_lora(as_model(llama / "out", trained), tmp_path / "x", Target("b", "CAUSAL_LM"))
    assert result.rank == 1
    original = transformers.AutoModelForCausalLM.from_pretrained(llama / "source")
    before = outputs(original)
    assert torch.equal(outputs(peft.PeftModel.from_pretrained(original, tmp_path / "x")), before)


def test_a_base_without_components_exports_its_factors(tmp_path):
    make_base(tmp_path, rank=0)
    trained = perturbed(tmp_path / "out", added=(3,))
    result = write_lora(as_model(tmp_path / "out", trained), tmp_path / "x", Target("b", None))
    assert {weight.rank for weight in result.weights} == {3}


def test_rounded_factors_are_in_the_measured_error(llama, tmp_path):
    trained = perturbed(llama / "out", size=1.0)
    target = Target("b", None, open_checkpoint(str(llama / "source")), torch.bfloat16)
    result = write_lora(as_model(llama / "out", trained), tmp_path / "x", target)
    written = safetensors.torch.load_file(tmp_path / "x" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    source = files_of(llama / "source")
    for weight in result.weights:
        prefix = f"base_model.model.{weight.name.removesuffix('.weight')}"
        up, down = (written[f"{prefix}.lora_{letter}.weight"].double().numpy() for letter in "BA")
        left = (
            source[weight.name].double().numpy() + up @ down - dense(llama / "out", weight.name, trained[weight.name])
        )
        assert weight.error == pytest.approx(np.linalg.norm(left), rel=1e-4)


class Stop(Exception):
    """A kill."""


def test_a_killed_run_goes_on_to_the_same_bytes(llama, tmp_path, monkeypatch):
    model = as_model(llama / "out", perturbed(llama / "out"))
    target = Target("b", None, open_checkpoint(str(llama / "source")))
    whole = write_lora(model, tmp_path / "whole", target)
    done = []

    def dying(trained, stored):
        done.append(trained)
        if len(done) == 5:
            raise Stop
        return difference(trained, stored)

    monkeypatch.setattr(export_lora, "difference", dying)
    with pytest.raises(Stop):
        write_lora(model, tmp_path / "x", target)
    assert write_lora(model, tmp_path / "x", target) == whole
    assert len(done) == 5 + 10, "the four that were finished are kept"
    assert write_lora(model, tmp_path / "x", target) == whole
    assert len(done) == 15
    names = {path.name for path in (tmp_path / "x").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "qsvd_export.json"}
    assert all((tmp_path / "x" / n).read_bytes() == (tmp_path / "whole" / n).read_bytes() for n in names)


def test_the_file_names_the_original_and_not_the_residual(llama, tmp_path):
    write_lora(as_model(llama / "out", perturbed(llama / "out")), tmp_path / "x", Target("b", None))
    source = json.loads((llama / "out" / "qsvd.json").read_text())["source"]
    with safetensors.safe_open(tmp_path / "x" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata().items() >= {"format": "pt", "qsvd_source_fingerprint": source["fingerprint"]}.items()


def test_gains_are_refused(llama, tmp_path):
    model = as_model(llama / "out", perturbed(llama / "out", gains=True))
    with pytest.raises(ValueError, match="scales the rows of its weights, which a LoRA on the 16-bit model cannot"):
        write_lora(model, tmp_path / "x", Target("b", None))


def test_another_original_is_refused(llama, tmp_path):
    write_checkpoint(tmp_path / "other", seed=7)
    target = Target("b", None, open_checkpoint(str(tmp_path / "other")))
    with pytest.raises(ValueError, match=r"other is not the model that .*out was made from, .*source: its fingerprint"):
        write_lora(as_model(llama / "out", perturbed(llama / "out")), tmp_path / "x", target)
    assert not (tmp_path / "x").exists()


def test_recorded_errors_that_cannot_be_read_are_refused(llama, tmp_path):
    out = shutil.copytree(llama / "out", tmp_path / "out")
    model = as_model(out, perturbed(out))
    (out / "errors.jsonl").write_text((llama / "out" / "errors.jsonl").read_text() + "\n")
    with pytest.raises(ValueError, match=r"errors.jsonl is damaged: its digest differs; give the 16-bit model"):
        write_lora(model, tmp_path / "x", Target("b", None))
    shutil.copy(llama / "out" / "errors.jsonl", out)
    model = as_model(without_digests(out), perturbed(out))
    lines = (out / "errors.jsonl").read_text().splitlines()
    advice = "give the 16-bit model"
    (out / "errors.jsonl").write_text("\n".join(lines[1:]))
    with pytest.raises(ValueError, match=rf"lacks 1 weights \(model.layers.0.self_attn.q_proj\); {advice}"):
        write_lora(model, tmp_path / "x", Target("b", None))
    for damaged in ('{"name": 1}', "[]", "{"):
        (out / "errors.jsonl").write_text(damaged)
        with pytest.raises(ValueError, match=rf"errors.jsonl, line 1: .*; {advice}"):
            write_lora(model, tmp_path / "x", Target("b", None))
    (out / "errors.jsonl").unlink()
    with pytest.raises(ValueError, match=rf"errors.jsonl does not exist; {advice}"):
        write_lora(model, tmp_path / "x", Target("b", None))
