"""What is known of each optimizer step while a run goes on."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    loss is in nats, of a trained token or of an example; tokens and seconds count from the start of the run, those of
    interrupted parts included; peak_bytes is of the device, or on a CPU of the process.
    """

    number: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    seconds: float
    peak_bytes: int


class TellSteps(TrainerCallback):
    """Gives a Step to `tell` after each one, and stops the run when `tell` says so.

    Args:
        tell: True asks for a checkpoint and the end.
        clock: Seconds since the start of the run.
        peak_bytes: Most memory so far.
    """

    def __init__(self, tell: Callable[[Step], bool], clock: Callable[[], float], peak_bytes: Callable[[], int]):
        self._tell, self._clock, self._peak_bytes = tell, clock, peak_bytes
        self._stop = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Comes once a step, between its end and its checkpoint."""
        del args, kwargs
        if logs is None or "grad_norm" not in logs:
            return  # the summary that transformers logs at the end
        step = Step(
            number=state.global_step,
            loss=logs["loss"],
            grad_norm=logs["grad_norm"],
            learning_rate=logs["learning_rate"],
            tokens=int(state.num_input_tokens_seen),
            seconds=round(self._clock(), 3),
            peak_bytes=self._peak_bytes(),
        )
        if self._tell(step):
            control.should_save = True
            control.should_training_stop = True


def peak_bytes_of(device: torch.device) -> Callable[[], int]:
    """A way to ask for the most memory so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return lambda: torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
