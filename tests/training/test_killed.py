"""Runs that get SIGKILL at three places, one after the other, end in the bytes of one that was left alone."""

from functools import partial

import pytest

import qsvd.commands.train
import qsvd.training.trainer
from qsvd.commands.train import train
from qsvd.training.checkpoints import checkpoints
from qsvd.training.run_folder import RunFolder
from tests.runs import outcome, steps_of, training
from tests.stops import killed


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # Python 3.12
@pytest.mark.parametrize(
    "changes",
    [
        {"method": "sorsa", "optimizer": "paged_adamw_8bit"},
        {"method": "dora", "rank": 4, "precondition": "riemannian"},
        {"method": "adalora", "rank": 4, "delta_t": 1, "tinit": 0.2, "target_rank": 2},
        {"method": "vera", "rank": 8},
        {"method": "singlora", "rank": 4, "ramp_steps": 4},
        {"method": "lorta", "rank": 4, "optimizer": "paged_adamw_8bit"},
        {"method": "r-lora", "rank": 4, "heads": 3, "dropout": 0.1},
        {"method": "lora-xs", "gradient_checkpointing": False},
        {"method": "lora-fa", "rank": 4, "packing": True, "refactor_every": 2},
        {"method": "pissa", "optimizer": "lora-rite"},
        {"method": "delta-lora", "rank": 4, "delta_start": 0.5},
    ],
    ids=str,
)
def test_killed_before_a_checkpoint_in_a_step_and_before_the_end(language, texts, tmp_path, monkeypatch, changes):
    """SIGKILL: a checkpoint is written and not renamed; a step is done and not told; all is done but the summary."""
    monkeypatch.chdir(tmp_path)
    options = training(language, texts, tmp_path / "run", steps=5, save_every=2, **changes)
    killed(monkeypatch, qsvd.training.trainer, "finish", 1, partial(train, options))
    assert not checkpoints(options.out)
    killed(monkeypatch, RunFolder, "add_step", 5, partial(train, options))
    assert len(steps_of(options.out)) == 4
    killed(monkeypatch, qsvd.commands.train, "finish_run", 1, partial(train, options))
    assert len(steps_of(options.out)) == 5
    train(options)
    alone = training(language, texts, tmp_path / "alone", steps=5, save_every=2, **changes)
    assert outcome(options.out) == outcome(train(alone))
