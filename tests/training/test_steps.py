"""What is told of each step: numbers of the trainer, and rates by their definitions."""

import math

import pytest
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qsvd.training.run_folder import Step
from qsvd.training.steps import TellSteps, peak_bytes_of
from tests.runs import sequences, settings, trainer

PEAK = 1e-3
WARM = 3  # of ten steps, at a share of 0.25
SHARES = {  # of the peak, `done` steps after the warm-up of `left` that follow it
    "cosine": lambda done, left: (1 + math.cos(math.pi * done / left)) / 2,
    "linear": lambda done, left: 1 - done / left,
    "constant": lambda _done, _left: 1.0,
}


def steps_of(made, tell=lambda _: (False, False)):
    found = []

    def note(step):
        found.append(step)
        return tell(step)

    made.add_callback(TellSteps(note, lambda: 2.0004, lambda: 77))
    made.train()
    return found


@pytest.mark.parametrize("schedule", SHARES)
def test_the_rate_rises_for_its_share_of_the_steps_and_falls_by_its_schedule(language, tmp_path, schedule):
    rows = {name: column[:1] for name, column in sequences().items()}
    chosen = settings(steps=10, schedule=schedule, warmup=0.25, batch_size=1)
    found = steps_of(trainer(language, tmp_path, rows, chosen))
    assert [step.number for step in found] == list(range(1, 11))
    expected = [number / WARM for number in range(WARM)]
    expected += [SHARES[schedule](done, 10 - WARM) for done in range(10 - WARM)]
    assert [step.learning_rate for step in found] == pytest.approx([PEAK * share for share in expected], abs=1e-12)


@pytest.mark.parametrize("packing", [False, True])
def test_a_step_counts_tokens_without_padding_and_takes_time_and_memory_as_told(language, tmp_path, packing):
    rows = sequences()
    found = steps_of(trainer(language, tmp_path, rows, settings(steps=3, packing=packing, max_length=40)))
    total = sum(map(len, rows["input_ids"]))
    assert [step.tokens for step in found] == [total, 2 * total, 3 * total]
    assert {(step.seconds, step.peak_bytes) for step in found} == {(2.0, 77)}


def test_the_loss_falls_and_the_logged_numbers_are_the_trainers(language, tmp_path):
    made, logged = trainer(language, tmp_path, sequences(), settings(steps=4)), []
    made.add_callback(type("Logs", (TrainerCallback,), {"on_log": lambda *_, logs, **__: logged.append(dict(logs))}))
    found = steps_of(made)
    assert [(s.loss, s.grad_norm) for s in found] == [(x["loss"], x["grad_norm"]) for x in logged[:4]]
    assert made.state.log_history == [], "a checkpoint would have its times"
    assert found[-1].loss < found[0].loss


def test_a_wish_to_stop_saves_and_ends(language, tmp_path):
    made = trainer(language, tmp_path, sequences(), settings(steps=5))
    assert len(steps_of(made, lambda step: (step.number == 2,) * 2)) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_the_summary_that_transformers_logs_at_the_end_is_no_step():
    told = []
    callback = TellSteps(lambda step: told.append(step) or (False, False), float, int)
    callback.on_log(None, TrainerState(), TrainerControl(), logs={"train_loss": 1.0})
    callback.on_log(None, TrainerState(), TrainerControl(), logs=None)
    assert told == []
    logs = {"loss": 1.5, "grad_norm": 2.0, "learning_rate": 0.1}
    here = TrainingArguments(use_cpu=True)
    callback.on_log(here, TrainerState(global_step=3, num_input_tokens_seen=9), TrainerControl(), logs=logs)
    assert told == [Step(3, 1.5, 2.0, 0.1, 9, 0.0, 0)]


def test_the_peak_of_a_cpu_run_is_the_processs_own():
    peak = peak_bytes_of(torch.device("cpu"))
    held = torch.ones(30_000_000)
    assert held.nbytes < peak() < 1e12
