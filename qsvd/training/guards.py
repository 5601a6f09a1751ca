"""Reasons to stop a training run: a first loss that is too high, a loss that is NaN, too little memory."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qsvd.data.columns import UNTRAINED
from qsvd.errors import TrainingStopped
from qsvd.training.settings import Settings

START_SLACK = 0.1  # nats that the first loss may be above that of the quantized model: rounding of the adapters
PACKING_SLACK = 0.1  # nats per token: rounding, and other experts because of it
PROBE = 64  # tokens by which packing is checked
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


def check_apart(model: Any, batch: Mapping[str, Tensor]) -> None:
    """Refuse a model for which a sequence depends on what stands before it in a packed row.

    One sequence stands in a row twice; the losses must be the same.

    Args:
        batch: Packed rows, input_ids and position_ids [batch, tokens]. The sequence is the first one, or its beginning.

    Raises:
        TrainingStopped: the losses differ by more than rounding.
    """
    starts = (batch["position_ids"][0, 1:PROBE] == 0).nonzero()
    length = int(starts[0, 0]) + 1 if len(starts) else min(PROBE, batch["position_ids"].shape[1])
    tokens_1T, positions_1T = (batch[name][:1, :length].repeat(1, 2) for name in ("input_ids", "position_ids"))
    labels_1T = tokens_1T.where(positions_1T > 0, UNTRAINED)
    model.eval()  # without dropout; the step switches back to train()
    with torch.no_grad():
        twice = {"input_ids": tokens_1T, "position_ids": positions_1T, "labels": labels_1T}
        chances_T = model(**twice, use_cache=False, fused_lm_head=True).log_probs[0]
    difference = (chances_T[: length - 1] - chances_T[length:]).abs().mean().item()
    if difference > PACKING_SLACK:
        raise TrainingStopped(
            f"--packing cannot be used for this {model.config.model_type} model: a sequence that stands twice in a row "
            f"has losses that differ by {difference:.3f} nats per token, so the model mixes the sequences of a row; "
            "leave --packing out"
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
