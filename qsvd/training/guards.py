"""Is this run worth its hours? The first loss against what guessing costs and what the base alone gives."""

import math

from qsvd.errors import TrainingStopped
from qsvd.training.settings import Settings

START_SLACK = 0.1  # nats that a start may lie above the base's loss: rounding of adapters, not another model
HEAD_SLACK = 2.0  # nats that a new classification head may lie above an even guess


def check_start(loss: float, base_loss: float, choices: int, *, is_classifier: bool) -> None:
    """Refuse an absurd start.

    Args:
        loss: Nats per token, or per example, of the model as training finds it.
        base_loss: The same batch with the stored components in the place of the adapters.
        choices: Size of the vocabulary, or number of classes.

    Raises:
        TrainingStopped: the start is worse than an even guess, or than the base; with the likely cause.
    """
    guess = math.log(choices)
    if not loss <= guess + (HEAD_SLACK if is_classifier else 0):
        cause = (
            "the base itself does so on this data: is its tokenizer the model's own, and the text in its language?"
            if base_loss > guess
            else f"the base alone has {base_loss:.3f}: the adapters do not belong to it"
        )
        raise TrainingStopped(
            f"the first loss is {loss:.3f} nats, worse than the {guess:.3f} of an even guess among {choices}; {cause} "
            "(--any-start trains all the same)"
        )
    if loss > base_loss + START_SLACK:
        raise TrainingStopped(
            f"the first loss is {loss:.3f} nats, but the base alone has {base_loss:.3f} on the same batch: the method "
            "does not start where the base is (--any-start trains all the same)"
        )


def no_number(what: str, value: float, step: int, saved: int | None) -> TrainingStopped:
    """What to say of a NaN or an infinity.

    Args:
        what: "loss" or "gradient norm".
        step: The step that it belongs to, from 1.
        saved: Step of the newest checkpoint, if there is one.
    """
    kept = "nothing was saved yet" if saved is None else f"checkpoint-{saved} is the last good one"
    return TrainingStopped(
        f"the {what} of step {step} is {value}; {kept}. Lower --learning-rate, raise --warmup, or look at the data "
        "near this step"
    )


def memory_advice(error: str, settings: Settings, *, used: float, total: float) -> str:
    """What to lower after the device ran out of memory; used and total are bytes of a GPU, total is 0 for a CPU."""
    batch_size, max_length = settings.batch_size, settings.max_length
    lower = [f"--batch-size {batch_size // 2} (with twice the --accumulate)"] if batch_size > 1 else []
    lower.append(f"--max-length {max_length // 2}")
    lower += [] if settings.gradient_checkpointing else ["--gradient-checkpointing"]
    lower += ["--activation-offload yes"] if total and not settings.activation_offload else []
    lower.append("a smaller --rank")
    held = f"{used / 1e9:.1f} of {total / 1e9:.1f} GB in use with " if total else ""
    return f"out of memory: {held}batch size {batch_size} x {max_length} tokens; try {', or '.join(lower)} ({error})"
