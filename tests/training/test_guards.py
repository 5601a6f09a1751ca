"""Runs that are stopped: a first loss that is too high, a loss that is not finite, too little memory."""

import math

import pytest
import torch

from qsvd.adapters.model import trained
from qsvd.errors import TrainingStopped
from qsvd.training.guards import HEAD_SLACK, START_SLACK, check_start, memory_advice, not_finite
from tests.runs import TRAINED, sequences, settings, trainer

GUESS = math.log(100)


def stopped(sentence):
    return pytest.raises(TrainingStopped, match=sentence)


@pytest.mark.parametrize("loss", [0.0, 2.0, 2.0 + START_SLACK - 1e-9])
def test_a_start_where_the_base_is_may_begin(loss):
    check_start(loss, 2.0, 100, is_classifier=False)


def test_a_start_above_the_base_is_stopped():
    with stopped(
        r"^the first loss is 2\.101 nats, but the quantized model has 2\.000 on the same batch: the adapter does not "
        r"start from its outputs \(--any-start trains anyway\)$"
    ):
        check_start(2.101, 2.0, 100, is_classifier=False)


@pytest.mark.parametrize("loss", [GUESS + 0.01, math.inf, math.nan])
def test_a_start_worse_than_guessing_is_the_adapters_if_the_base_is_better(loss):
    with stopped(
        rf"^the first loss is {loss:.3f} nats, higher than 4\.605, the loss of guessing among 100; the quantized model "
        r"without the adapter has 2\.000: the adapter does not belong to it \(--any-start trains anyway\)$"
    ):
        check_start(loss, 2.0, 100, is_classifier=False)


def test_a_start_worse_than_guessing_is_the_datas_if_the_base_is_no_better():
    with stopped(
        r"the loss of guessing among 100; the quantized model without the adapter is no better: check that the data"
    ):
        check_start(5.0, 5.0, 100, is_classifier=False)


def test_a_new_head_may_be_worse_than_guessing_by_its_slack():
    loss = math.log(2) + HEAD_SLACK
    check_start(loss - 1e-9, loss, 2, is_classifier=True)
    with stopped(r"^the first loss is 2\.694 nats, higher than 0\.693, the loss of guessing among 2; "):
        check_start(loss + 1e-3, loss, 2, is_classifier=True)


def test_the_message_on_a_value_that_is_not_finite_names_the_step_and_what_was_saved():
    assert str(not_finite("loss", math.nan, 7, 5)) == (
        "the loss of step 7 is NaN; the last good checkpoint is checkpoint-5. Lower --learning-rate, raise --warmup, "
        "or check the data near this step"
    )
    assert "is inf; no checkpoint was saved. Lower" in str(not_finite("gradient norm", math.inf, 1, None))


@pytest.mark.parametrize(
    ("changed", "lower"),
    [
        ({"batch_size": 8}, "--batch-size 4 --accumulate 2, or --max-length 512, or "),
        ({"batch_size": 1}, "--max-length 512, or "),
    ],
)
@pytest.mark.parametrize("is_on", [False, True])
def test_the_advice_has_what_was_used_and_what_is_left_to_lower(changed, lower, is_on):
    both = {"gradient_checkpointing": is_on, "activation_offload": is_on}
    text = memory_advice("tried 2 GiB", settings(max_length=1024, **changed, **both), used=7.5e9, total=8e9)
    rest = "" if is_on else "--gradient-checkpointing, or --activation-offload yes, or "
    assert text == (
        f"out of memory: 7.5 of 8.0 GB in use with batch size {changed['batch_size']} x 1024 tokens; try {lower}{rest}"
        "a smaller --rank (tried 2 GiB)"
    )


def test_the_advice_for_a_cpu_offloads_nothing_and_knows_no_total():
    text = memory_advice("tried 2 GiB", settings(batch_size=1, max_length=64), used=0, total=0)
    assert text == (
        "out of memory: batch size 1 x 64 tokens; try --max-length 32, or --gradient-checkpointing, "
        "or a smaller --rank (tried 2 GiB)"
    )


class Spoil:
    """Makes one gradient infinite in step 3."""

    @classmethod
    def after_backward(cls, model, step):
        if step == 3:
            next(iter(trained(model).values())).grad[0, 0] = math.inf


class Poison:
    """Makes one parameter a NaN in step 3, before its forward pass."""

    @classmethod
    def after_step(cls, model, step):
        if step == 2:
            next(iter(trained(model).values())).data[0, 0] = math.nan

    @classmethod
    def after_backward(cls, model, step):
        del model
        assert step <= 2


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_an_infinite_gradient_stops_the_run_before_it_spoils_the_parameters(language, tmp_path, clip):
    chosen = settings(steps=5, save_every=1, max_grad_norm=clip)
    made = trainer(language, tmp_path, sequences(), chosen, Spoil)
    with stopped(r"^the gradient norm of step 3 is inf; the last good checkpoint is checkpoint-2\. Lower"):
        made.train()
    made.model.save_pretrained(tmp_path / "end")
    assert (tmp_path / "end" / TRAINED).read_bytes() == (tmp_path / "checkpoint-2" / TRAINED).read_bytes()
    assert all(parameter.isfinite().all() for parameter in trained(made.model).values())


def test_a_loss_that_is_nan_stops_the_run(language, tmp_path):
    made = trainer(language, tmp_path, sequences(), settings(steps=5, save_every=2), Poison)
    with stopped(r"^the loss of step 3 is NaN; the last good checkpoint is checkpoint-2\. Lower"):
        made.train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert torch.is_grad_enabled()
