"""The PEFT folder, judged by plain PEFT on the plain 4-bit base and by float64 NumPy."""

import json
import re

import peft
import pytest
import safetensors
import safetensors.torch
import torch
import transformers

import qsvd
from qsvd.export.peft import PeftExport, write_peft
from qsvd.export.trained import Trained
from tests.commands.folders import shared_model
from tests.export.cases import (
    HALF_ULP,
    as_model,
    assert_same_outputs,
    base_in_float32,
    dense_model,
    exact_outputs,
    make_base,
    outputs,
    perturbed,
    trained_weights,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT 0.21 asks for it
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),  # it replaces the components
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("bert"), "BertModel")


def tensors_in(folder):
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")


def config_in(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def test_plain_peft_on_the_base_gives_the_trained_logits(llama, tmp_path):
    trained = perturbed(llama / "out")
    result = write_peft(as_model(llama / "out", trained), tmp_path / "lora", base=str(llama / "out"), task="CAUSAL_LM")
    factors = tensors_in(tmp_path / "lora")
    assert result == PeftExport(14, 4, 4, False, (), sum(t.nbytes for t in factors.values()))
    exact, rounding = exact_outputs(llama / "source", trained_weights(llama / "out", trained))
    base = base_in_float32(llama / "out")
    assert (outputs(base) - exact).abs().max() > 100 * rounding, "the adapter would not be missed"
    model = peft.PeftModel.from_pretrained(base, tmp_path / "lora")
    assert isinstance(model, peft.PeftModelForCausalLM)
    assert_same_outputs(model, exact, rounding)


@pytest.mark.slow
def test_a_trained_model_gives_the_trained_logits(tmp_path):
    source = shared_model("stories260K")
    qsvd.quantize(qsvd.Quantize(str(source), out=tmp_path / "out", rank=16, iterations=1))
    trained = perturbed(tmp_path / "out", size=0.02, gains=True)
    write_peft(as_model(tmp_path / "out", trained), tmp_path / "x", base="x", task="CAUSAL_LM")
    model = peft.PeftModel.from_pretrained(base_in_float32(tmp_path / "out"), tmp_path / "x")
    assert_same_outputs(model, *exact_outputs(source, trained_weights(tmp_path / "out", trained)))


def test_ranks_that_differ_keep_the_scale_1(llama, tmp_path):
    trained = perturbed(llama / "out", added=(0, 3, 1))
    first = next(iter(trained))
    rows, columns = trained[first].up_OK.shape[0], trained[first].down_KI.shape[1]
    trained[first] = Trained(torch.zeros(rows, 0), torch.zeros(0, columns))
    result = write_peft(as_model(llama / "out", trained), tmp_path / "lora", base="x", task="CAUSAL_LM")
    assert (result.rank, result.least_rank) == (7, 1)
    config = config_in(tmp_path / "lora")
    assert config["r"] == config["lora_alpha"] == 7
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert sorted(config["rank_pattern"].values()) == [1, *[4] * 4, *[5] * 4]
    # the first one too: PEFT must replace the components that transformers put there
    assert sorted(config["target_modules"]) == sorted(name.removesuffix(".weight") for name in trained)
    model = peft.PeftModel.from_pretrained(base_in_float32(llama / "out"), tmp_path / "lora")
    assert_same_outputs(model, *exact_outputs(llama / "source", trained_weights(llama / "out", trained)))


def test_a_pattern_is_for_one_module_only(llama, tmp_path):
    trained = perturbed(llama / "out", added=(1, 0))
    write_peft(as_model(llama / "out", trained), tmp_path / "lora", base="x", task=None)
    paths = [name.removesuffix(".weight") for name in trained]
    for pattern in config_in(tmp_path / "lora")["rank_pattern"]:
        assert len([path for path in paths if re.match(rf"(.*\.)?({pattern})$", f"{path}")]) == 1
        assert not any(re.match(rf"(.*\.)?({pattern})$", f"vision.{path}") for path in paths)


def test_plain_peft_makes_the_gains_of_a_dora(llama, tmp_path):
    trained = perturbed(llama / "out", gains=True)
    result = write_peft(as_model(llama / "out", trained), tmp_path / "dora", base="x", task="CAUSAL_LM")
    assert result.use_dora
    assert config_in(tmp_path / "dora")["use_dora"] is True
    exact, rounding = exact_outputs(llama / "source", trained_weights(llama / "out", trained))
    model = peft.PeftModel.from_pretrained(base_in_float32(llama / "out"), tmp_path / "dora")
    assert_same_outputs(model, exact, rounding)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_are_rounded_once_to_the_dtype(llama, tmp_path, dtype):
    trained = perturbed(llama / "out", gains=True)
    write_peft(as_model(llama / "out", trained), tmp_path / "x", base="x", task=None, dtype=dtype)
    written = tensors_in(tmp_path / "x")
    assert len(written) == 3 * 14
    for name, weight in trained.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        for values, key in ((weight.up_OK, "lora_B.weight"), (weight.down_KI, "lora_A.weight")):
            rounded = written[f"{prefix}.{key}"]
            assert rounded.dtype == dtype
            smallest = torch.finfo(dtype).smallest_normal
            assert (rounded.double() - values).abs().le(HALF_ULP[dtype] * values.abs().clamp(min=smallest)).all()
        assert written[f"{prefix}.lora_magnitude_vector"].dtype == torch.float32


def test_the_file_names_the_base_it_is_for(llama, tmp_path):
    write_peft(as_model(llama / "out", perturbed(llama / "out")), tmp_path / "x", base="my/base", task="CAUSAL_LM")
    manifest = json.loads((llama / "out" / "qsvd.json").read_text())
    with safetensors.safe_open(tmp_path / "x" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata().items() >= {"format": "pt", "qsvd_base_fingerprint": manifest["fingerprint"]}.items()
    config = config_in(tmp_path / "x")
    assert (config["base_model_name_or_path"], config["task_type"]) == ("my/base", "CAUSAL_LM")
    assert config["init_lora_weights"] is True


def test_the_same_export_again_changes_nothing_and_another_is_refused(llama, tmp_path):
    model = as_model(llama / "out", perturbed(llama / "out"))
    first = write_peft(model, tmp_path / "x", base="b", task=None)
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "x").iterdir()}
    assert set(before) == {"adapter_config.json", "adapter_model.safetensors", "qsvd_export.json"}
    assert write_peft(model, tmp_path / "x", base="b", task=None) == first
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "x").iterdir()} == before
    other = as_model(llama / "out", perturbed(llama / "out", seed=1))
    with pytest.raises(
        ValueError,
        match=r"x was written with other options: the run changed; give the same options to",
    ):
        write_peft(other, tmp_path / "x", base="b", task=None)


def with_head(folder, trained):
    """What a classifier trained on a bare encoder hands to the export."""
    generator = torch.Generator().manual_seed(5)
    head = {"classifier.weight": torch.randn(3, 64, generator=generator), "classifier.bias": torch.arange(3.0)}
    model = as_model(folder, trained)
    names = [*model.split.weights, *model.others()]
    return as_model(folder, trained, full=head, spelling={f"bert.{name}": name for name in names})


def test_a_head_on_a_bare_encoder_is_saved_whole(bert, tmp_path):
    trained = perturbed(bert / "out")
    model = with_head(bert / "out", trained)
    result = write_peft(model, tmp_path / "x", base="x", task="SEQ_CLS")
    assert result.kept_modules == ("classifier",)
    auto = transformers.AutoModelForSequenceClassification
    weights = {f"bert.{path}": weight for path, weight in trained_weights(bert / "out", trained).items()}
    weights["classifier"] = model.full["classifier.weight"].double().numpy()
    logits = []
    for dtype in (torch.float64, torch.float32):
        dense = dense_model(bert / "source", weights, dtype, auto, num_labels=3)
        dense.classifier.bias.data = model.full["classifier.bias"].to(dtype)
        logits.append(outputs(dense))
    loaded = peft.PeftModel.from_pretrained(base_in_float32(bert / "out", auto, num_labels=3), tmp_path / "x")
    assert_same_outputs(loaded, logits[0], (logits[1] - logits[0]).abs().max().item())


def test_a_head_of_the_base_that_was_not_trained_goes_along(tmp_path):
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, vocab_size=96, num_labels=3
    )
    torch.manual_seed(0)
    source = transformers.LlamaForSequenceClassification(config)
    source.save_pretrained(tmp_path / "source")
    qsvd.quantize(qsvd.Quantize(str(tmp_path / "source"), out=tmp_path / "out", rank=2, iterations=1))
    model = as_model(tmp_path / "out", perturbed(tmp_path / "out"))
    assert write_peft(model, tmp_path / "x", base="x", task="SEQ_CLS").kept_modules == ("score",)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "x")
    assert torch.equal(loaded.base_model.model.score.modules_to_save["default"].weight, source.score.weight)


def test_a_norm_trained_in_full_is_saved_with_its_untrained_bias(bert, tmp_path):
    name = "encoder.layer.0.output.LayerNorm"
    full = {f"{name}.weight": torch.full((64,), 2.0)}
    model = as_model(bert / "out", perturbed(bert / "out"), full=full)
    assert write_peft(model, tmp_path / "x", base="x", task=None).kept_modules == (name,)
    written = tensors_in(tmp_path / "x")
    assert torch.equal(written[f"base_model.model.{name}.weight"], full[f"{name}.weight"])
    assert f"base_model.model.{name}.bias" in written
    loaded = peft.PeftModel.from_pretrained(transformers.AutoModel.from_pretrained(bert / "out"), tmp_path / "x")
    norm = loaded.base_model.model.encoder.layer[0].output.LayerNorm.modules_to_save["default"]
    assert norm.weight.eq(2).all()


def test_a_task_without_its_head_is_refused(bert, tmp_path):
    model = as_model(bert / "out", perturbed(bert / "out"))
    with pytest.raises(ValueError, match="SEQ_CLS adapter only with a module classifier or score, and neither"):
        write_peft(model, tmp_path / "x", base="x", task="SEQ_CLS")
    assert not (tmp_path / "x").exists()


def test_parameters_that_peft_cannot_save_are_refused(bert, tmp_path):
    name = "encoder.layer.0.attention.self.query"
    full = {"loose": torch.ones(3), f"{name}.bias": torch.ones(64), "encoder.layer.0.scale": torch.ones(1)}
    model = as_model(bert / "out", perturbed(bert / "out"), full=full)
    refused = rf"the whole model, encoder\.layer\.0, {re.escape(name)}; export merged"
    with pytest.raises(ValueError, match=f"PEFT saves modules whole, and these have split weights: {refused}"):
        write_peft(model, tmp_path / "x", base="x", task=None)


def test_a_row_of_zeros_cannot_be_scaled(llama, tmp_path):
    trained = perturbed(llama / "out", gains=True)
    name = "model.layers.1.mlp.up_proj.weight"
    model = as_model(llama / "out", trained)
    q, weight = model.split.residual(name).decode(), trained[name]
    rows, columns = q.shape
    up = torch.zeros(rows, columns)
    up[5] = -q[5]
    trained[name] = Trained(up, torch.eye(columns), weight.gain_O)
    with pytest.raises(ValueError, match=r"up_proj.weight has 1 rows of zeros \(row 5\), which PEFT's DoRA turns into"):
        write_peft(model, tmp_path / "x", base="x", task=None)
    assert not (tmp_path / "x").exists(), "nothing was finished, so nothing stays"
