"""Every method through `qsvd train`: offloaded and checkpointed as resident, on mixed bits, and from another run."""

import json

import pytest
import torch

import qsvd
from qsvd.adapters.methods.table import METHODS
from qsvd.commands.train import train
from tests.gradients import write_gradients
from tests.runs import language_base, outcome, training

OWN = {
    "lora": {"rank": 4},
    "dora": {"rank": 4},
    "adalora": {"rank": 4, "delta_t": 1, "tinit": 0.2, "target_rank": 2},
    "lora-fa": {"rank": 4},
    "vera": {"rank": 8},
    "lora-ga": {"rank": 4},
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
        options = training(mixed, texts, tmp_path / name, steps=2, method=method, learning_rate=1e-3, **own, **changes)
        return outcome(train(options))

    resident = trained("resident", resident=1.0, gradient_checkpointing=False)
    state = torch.load(tmp_path / "resident" / "checkpoint-2" / "optimizer.pt", weights_only=True)["state"]
    summary = json.loads((tmp_path / "resident" / "summary.json").read_text())
    assert sum(one["exp_avg"].numel() for one in state.values()) == summary["trained_parameters"]
    assert trained("paged", resident=0.0, gradient_checkpointing=True) == resident
    file.unlink(missing_ok=True)
    adapter, steps = trained("next", init_from=tmp_path / "resident")
    assert adapter != resident[0]
    assert steps[0]["loss"] < resident[1][0]["loss"]
