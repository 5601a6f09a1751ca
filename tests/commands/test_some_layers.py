"""A run that trains some layers: what it holds, and what eval and export make of it."""

import json

import pytest
import safetensors.torch
import torch

import qsvd
from qsvd.adapters.model import split_linears, trained
from qsvd.cli import run as qsvd_command
from tests.commands.trained_runs import MOVE
from tests.export.cases import make_base
from tests.runs import text_rows, training, words, write_rows

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT asks for an old name
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base")) / "out"


def moved_run(base, folder, method):
    """A run with random steps in the layers q_proj and down_proj of every block."""
    options = qsvd.AdapterOptions(method, target_modules=("q_proj", "*.down_proj"), dropout=0.5 * (method == "lora"))
    model = qsvd.load(base, options=options, device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter += MOVE * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("case", ["pissa lora", "lora peft", "edora peft", "edora merged"])
def test_an_export_computes_what_some_trained_layers_and_the_frozen_ones_do(base, tmp_path, capsys, case):
    """The command itself compares the logits, by plain PEFT or transformers, and refuses a wrong export."""
    method, form = case.split()
    model = moved_run(base, tmp_path / "run", method)
    owners = {name.rpartition(".")[0].rpartition(".")[2] for name in trained(model)}
    assert owners == {"q_proj", "down_proj"}
    saved = safetensors.torch.load_file(tmp_path / "run" / "qsvd_adapter.safetensors")
    assert set(saved) == set(trained(model))
    again = qsvd.load(base, adapter=tmp_path / "run", device="cpu")
    assert set(trained(again)) == set(saved)
    dropped = {path.rpartition(".")[2] for path, linear in split_linears(again) if linear.adapter.dropout}
    assert dropped == (owners if method == "lora" else set())
    arguments = ["export", tmp_path / "run", "--to", form, "--out", tmp_path / "export"]
    assert qsvd_command([str(argument) for argument in arguments]) == 0
    assert "checked: logits differ by" in capsys.readouterr().out


def test_a_run_trains_the_layers_that_were_asked_for_and_says_so(language, tmp_path):
    base = language
    data = write_rows(tmp_path / "texts.jsonl", text_rows())
    options = training(base, data, tmp_path / "run", target_modules=("self_attn.q_proj,v_proj",), steps=1)
    assert qsvd_command(words(options)) == 0
    record = json.loads((tmp_path / "run" / "qsvd_adapter.json").read_text())
    assert record["target_modules"] == ["self_attn.q_proj", "v_proj"]
    saved = safetensors.torch.load_file(tmp_path / "run" / "qsvd_adapter.safetensors")
    layer = "model.layers.0.self_attn"
    assert set(saved) == {f"{layer}.{name}.{part}" for name in ("q_proj", "v_proj") for part in ("up", "down")}
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["trained_parameters"] == sum(tensor.numel() for tensor in saved.values())
    assert summary["planned"]["trained parameters"] == sum(tensor.nbytes for tensor in saved.values())


def test_pissa_has_nothing_to_train_in_layers_without_components(plain, tmp_path, capsys):
    base = plain
    data = write_rows(tmp_path / "texts.jsonl", text_rows())
    options = training(base, data, tmp_path / "run", target_modules=("q_proj",), method="pissa")
    assert qsvd_command(words(options)) == 2
    assert "pissa trains stored components, and the quantized model has none" in capsys.readouterr().err
