"""Every method through `qsvd train`: offloaded and checkpointed as resident, on mixed bits, and from another run."""

import json

import pytest
import torch

import qsvd
from qsvd.adapters.methods.table import METHODS, export_refusal
from qsvd.commands.train import train
from tests.gradients import write_gradients
from tests.runs import language_base, outcome, training

OWN = {
    "lora": {"rank": 4, "prune_every": 1},
    "dora": {"rank": 4},
    "adalora": {"rank": 4, "delta_t": 1, "tinit": 0.2, "target_rank": 2},
    "lora-fa": {"rank": 4},
    "vera": {"rank": 8},
    "lora-ga": {"rank": 4},
    "randlora": {"rank": 16},
    "mo-sara": {"cores": 3},
    "r-lora": {"rank": 4, "heads": 3, "dropout": 0.1},
    "melora": {"rank": 2},
    "kron-lora": {"rank": 4},
    "singlora": {"rank": 4, "ramp_steps": 3},
    "symlora": {"rank": 4},
    "lora-mini": {"rank": 4, "outer_out": 20, "outer_in": 12},
    "cora": {"rank": 4},
    "lorta": {"rank": 4},
    "lora2": {"rank": 4, "inner_size": 3, "learning_rate": 0.2},  # a product of five, of which four begin at 0.02
    "delta-lora": {"rank": 4, "delta_start": 0.5},
    "xgblora": {"rank": 4, "booster_steps": 1, "booster_layers": 1},
    "weightlora": {"rank": 4, "gate_every": 1, "grow": 1},
    "losa": {"rank": 4},
}


@pytest.fixture(scope="session")
def mixed(tmp_path_factory):
    """As `language`, with bits and ranks by a budget."""
    folder = tmp_path_factory.getbasetemp() / "mixed"
    source = language_base(folder).parent / "source"
    options = {"budget": "6.5bits", "iterations": 1, "device": "cpu"}
    return qsvd.quantize(source, out=folder / "budget", **options).path


@pytest.mark.parametrize("method", METHODS)
def test_offloaded_and_checkpointed_equals_resident_and_a_run_goes_on_from_it(mixed, texts, tmp_path, method):
    own, file = OWN.get(method, {}), tmp_path / "gradients"
    if method == "lora-ga":
        own = {**own, "gradients": write_gradients(mixed, file, 4)}

    def trained(name, **changes):
        chosen = {"learning_rate": 1e-3, **own, **changes}
        return outcome(train(training(mixed, texts, tmp_path / name, steps=2, method=method, **chosen)))

    resident = trained("resident", resident=1.0, gradient_checkpointing=False)
    state = torch.load(tmp_path / "resident" / "checkpoint-2" / "optimizer.pt", weights_only=True)["state"]
    run = tmp_path / "resident"
    summary = json.loads((run / "summary.json").read_text())
    exports = {form: export_refusal(method, form) is None for form in ("peft", "merged")}
    assert (run / "adapter_config.json").exists() == (run / "adapter_model.safetensors").exists() == exports["peft"]
    assert {form: f"--to {form}" in (run / "README.md").read_text() for form in exports} == exports
    assert sum(one["exp_avg"].numel() for one in state.values()) == summary["trained_parameters"]
    assert trained("paged", resident=0.0, gradient_checkpointing=True) == resident
    file.unlink(missing_ok=True)
    adapter, steps = trained("next", init_from=tmp_path / "resident")
    assert adapter != resident[0]
    assert steps[0]["loss"] < resident[1][0]["loss"]
