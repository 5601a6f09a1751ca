"""Reasons to stop a training run: a first loss that is too high, a loss that is NaN, too little memory."""

import math

from qsvd.errors import TrainingStopped
from qsvd.training.settings import Settings

START_SLACK = 0.1  # nats that the first loss may be above that of the quantized model: rounding of the adapters
HEAD_SLACK = 2.0  # nats that the first loss of a new classification head may be above that of guessing


def check_start(loss: float, base_loss: float, choices: int, *, is_classifier: bool) -> None:
    """Refuse a first loss that is too high.

    Args:
        loss: Nats per token, or per example, at the start of training.
        base_loss: The same batch with the stored components instead of the adapters.
        choices: Size of the vocabulary, or number of classes.

    Raises:
        TrainingStopped: loss is higher than that of guessing, or than base_loss.
    """
    guess = math.log(choices)
    if not loss <= guess + (HEAD_SLACK if is_classifier else 0):
        cause = (
            "the quantized model without the adapter is no better: check that the data is in its language and that its "
            "tokenizer belongs to it"
            if base_loss > guess
            else f"the quantized model without the adapter has {base_loss:.3f}: the adapter does not belong to it"
        )
        raise TrainingStopped(
            f"the first loss is {loss:.3f} nats, higher than {guess:.3f}, the loss of guessing among {choices}; "
            f"{cause} (--any-start trains anyway)"
        )
    if loss > base_loss + START_SLACK:
        raise TrainingStopped(
            f"the first loss is {loss:.3f} nats, but the quantized model has {base_loss:.3f} on the same batch: the "
            "adapter does not start from its outputs (--any-start trains anyway)"
        )


def not_finite(what: str, value: float, step: int, saved: int | None) -> TrainingStopped:
    """Return the error for a NaN or an infinity.

    Args:
        what: "loss" or "gradient norm".
        step: Its step, from 1.
        saved: Step of the newest checkpoint; None if there is none.
    """
    kept = "no checkpoint was saved" if saved is None else f"the last good checkpoint is checkpoint-{saved}"
    shown = "NaN" if math.isnan(value) else value
    return TrainingStopped(
        f"the {what} of step {step} is {shown}; {kept}. Lower --learning-rate, raise --warmup, or check the data near "
        "this step"
    )


def memory_advice(error: str, settings: Settings, *, used: float, total: float) -> str:
    """Return a message with options that save memory.

    Args:
        error: What the library says.
        used, total: Bytes of the GPU; total is 0 for a CPU.
    """
    batch_size, max_length = settings.batch_size, settings.max_length
    options = [f"--batch-size {batch_size // 2} --accumulate {2 * settings.accumulate}"] if batch_size > 1 else []
    options.append(f"--max-length {max_length // 2}")
    is_recomputed = settings.gradient_checkpointing and not settings.unrecomputed
    options += [] if is_recomputed else ["--gradient-checkpointing"]
    options += ["--activation-offload yes"] if total and not settings.activation_offload else []
    options.append("a smaller --rank")
    held = f"{used / 1e9:.1f} of {total / 1e9:.1f} GB in use with " if total else ""
    return f"out of memory: {held}batch size {batch_size} x {max_length} tokens; try {', or '.join(options)} ({error})"
