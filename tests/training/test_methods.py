"""Methods with code of their own in a run: offloaded and resumed as resident, on mixed bits, from another run."""

from dataclasses import replace

import pytest
import torch

import qsvd
from qsvd.adapters.methods.hooks import Hooks
from qsvd.adapters.methods.table import METHODS, export_refusal
from qsvd.adapters.start import new_record
from qsvd.commands.train import train
from qsvd.memory.items import EVERYTHING
from qsvd.prepare.train import load_start, prepare_train, starting_options
from qsvd.training.steps import TellSteps
from qsvd.training.trainer import make_trainer
from tests.checkpoints import write_checkpoint, write_tokenizer
from tests.gradients import write_gradients
from tests.mixed import modules_of, write_table
from tests.runs import TRAINED, training

OWN = {
    "lora": {"rank": 4, "prune_every": 1},
    "dora": {"rank": 4, "precondition": "riemannian"},
    "adalora": {"rank": 4, "delta_t": 1, "tinit": 0.2, "target_rank": 2, "learning_rate": 0.1},
    "lora-fa": {"rank": 4, "refactor_every": 1},
    "vera": {"rank": 8},
    "lora-ga": {"rank": 4},
    "randlora": {"rank": 16},
    "mo-sara": {"cores": 3},
    "r-lora": {"rank": 4, "heads": 3, "dropout": 0.1},
    "melora": {"rank": 2},
    "kron-lora": {"rank": 4},
    "singlora": {"rank": 4, "ramp_steps": 3, "accumulate": 2},
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
    """A random model with all codecs and three ranks, which take turns."""
    folder = tmp_path_factory.getbasetemp() / "mixed"
    write_checkpoint(folder / "source", vocab_size=4096, num_hidden_layers=1)
    write_tokenizer(folder / "source")
    table = folder / "table.txt"
    write_table(table, modules_of(folder / "source"), ranks=(16, 9, 5))
    return qsvd.quantize(
        str(folder / "source"), out=folder / "mixed", allocation=table, iterations=1, device="cpu"
    ).path


def trained(run, folder, checkpoint=None, *, is_compared=False):
    """The bytes of the adapter and the losses of a checked run, without what `qsvd train` writes beside them.

    Args:
        is_compared: Whether the first loss is compared with that of the stored components.
    """
    torch.manual_seed(run.options.seed)
    model, compared = load_start(run, is_resumed=checkpoint is not None), run.split if is_compared else None
    made, losses = make_trainer(model, run.data.tokenizer, run.data.dataset, run.settings, folder, compared), []
    made.add_callback(TellSteps(lambda step: losses.append(step.loss) or (False, False), float, int))
    made.train(resume_from_checkpoint=checkpoint)
    model.save_pretrained(folder)
    return (folder / TRAINED).read_bytes(), losses


def options_of(base, texts, out, method, own, **changes):
    """Two steps, each of which moves the adapter and is saved."""
    chosen = {"learning_rate": 1e-2, "warmup": 0.0, "accumulate": 1, "steps": 2, "save_every": 1, "any_start": True}
    chosen |= {**own, **changes}
    return training(base, texts, out, method=method, **chosen)


def has_own_code(method):
    """Whether a run of it does more at its start or between steps than one of any other."""
    kind = METHODS[method]
    starts = kind.in_common or kind.starts_from_gradient or kind.starts_from_residual
    return kind.hooks is not Hooks or bool(starts) or method in ("pissa", "r-lora")  # the plainest; draws at its start


@pytest.mark.parametrize("method", [*filter(has_own_code, METHODS)])
def test_offloaded_checkpointed_and_resumed_equal_resident_and_a_run_goes_on_from_it(mixed, texts, tmp_path, method):
    own, file, out = OWN.get(method, {}), tmp_path / "gradients", tmp_path / "paged"
    if method == "lora-ga":
        own = {**own, "gradients": write_gradients(mixed, file, 4)}
    paged = prepare_train(options_of(mixed, texts, out, method, own, resident=0.0, gradient_checkpointing=True))
    adapter, losses = trained(paged, out, is_compared=True)
    kept = replace(paged.settings, gradient_checkpointing=False)
    resident = replace(paged, placed=replace(paged.placed, placement=EVERYTHING), settings=kept)
    assert trained(resident, tmp_path / "resumed", str(out / "checkpoint-1")) == (adapter, losses[1:])
    if METHODS[method].hooks is Hooks and method != "pissa":
        return  # what such a one starts from is compared in tests/adapters/test_model.py
    file.unlink(missing_ok=True)
    options = options_of(mixed, texts, tmp_path / "next", method, own, init_from=out)
    start, first = starting_options(options, paged.split)
    record, once = new_record(paged.split, start), replace(kept, steps=1)
    begun = replace(resident, options=options, record=record, init_from=first, settings=once)
    other, later = trained(begun, begun.out)
    assert other != adapter
    assert later[0] < losses[0]


@pytest.mark.parametrize("method", ["pissa", "losa", "mo-sara"])  # with both exports, with one, with none
def test_a_run_has_and_names_the_files_that_its_method_can_have(mixed, texts, tmp_path, method):
    run = tmp_path / "run"
    trained_parameters = train(options_of(mixed, texts, run, method, OWN.get(method, {}))).summary.trained_parameters
    state = torch.load(run / "checkpoint-2" / "optimizer.pt", weights_only=True)["state"]
    exports = {form: export_refusal(method, form) is None for form in ("peft", "merged")}
    assert (run / "adapter_config.json").exists() == (run / "adapter_model.safetensors").exists() == exports["peft"]
    assert {form: f"--to {form}" in (run / "README.md").read_text() for form in exports} == exports
    assert sum(one["exp_avg"].numel() for one in state.values()) == trained_parameters
