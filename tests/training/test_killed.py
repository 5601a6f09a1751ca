"""A run that gets SIGKILL at three places, one after the other, ends in the bytes of one that was left alone."""

from functools import partial

import pytest

import qsvd.commands.train
import qsvd.training.trainer
from qsvd.commands.train import train
from qsvd.training.checkpoints import checkpoints
from qsvd.training.run_folder import RunFolder
from tests.runs import outcome, steps_of, training
from tests.stops import killed

METHOD = {
    "method": "adalora",
    "rank": 4,
    "delta_t": 1,
    "tinit": 0.2,
    "target_rank": 2,
    "warmup": 0.0,
}  # whose hooks have a state


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # Python 3.12
def test_killed_before_a_checkpoint_in_a_step_and_before_the_end(language, texts, tmp_path, monkeypatch):
    """SIGKILL: a checkpoint is written and not renamed; a step is done and not told; all is done but the summary."""
    monkeypatch.chdir(tmp_path)
    options = training(language, texts, tmp_path / "run", steps=2, save_every=1, **METHOD)
    killed(monkeypatch, qsvd.training.trainer, "finish", 1, partial(train, options))
    assert not checkpoints(options.out)
    killed(monkeypatch, RunFolder, "add_step", 2, partial(train, options))
    assert len(steps_of(options.out)) == 1
    killed(monkeypatch, qsvd.commands.train, "finish_run", 1, partial(train, options))
    assert len(steps_of(options.out)) == 2
    train(options)
    alone = training(language, texts, tmp_path / "alone", steps=2, save_every=1, **METHOD)
    assert outcome(options.out) == outcome(train(alone))
