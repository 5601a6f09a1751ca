"""The optimizer steps of a run as they are logged, and its memory by item, measured and planned."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qsvd.adapters.methods.hooks import Course
from qsvd.adapters.model import split_linears
from qsvd.adapters.pages.sharded import ShardedPages
from qsvd.memory.items import MemoryPlan
from qsvd.records import Step
from qsvd.training.settings import forget
from qsvd.training.together import over_all


class TellSteps(TrainerCallback):
    """Calls `tell` with each Step, which returns whether the run is to save a checkpoint, and whether it is to stop.

    Of several processes each tells, and what one of them wants is done by all.

    Args:
        clock: Returns the seconds since the start of the run.
        peak_bytes: Returns the most memory so far.
    """

    def __init__(
        self, tell: Callable[[Step], tuple[bool, bool]], clock: Callable[[], float], peak_bytes: Callable[[], int]
    ):
        self._tell, self._clock, self._peak_bytes = tell, clock, peak_bytes

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Report a step; transformers calls this between the end of a step and its checkpoint."""
        del kwargs
        state.log_history.clear()  # it grows, and its times would make every checkpoint another one
        if logs is None or "grad_norm" not in logs:
            return  # the summary that transformers logs at the end of the run
        (peak_bytes,) = over_all([self._peak_bytes()], args.device, greatest=True)
        step = Step(
            number=state.global_step,
            loss=logs["loss"],
            grad_norm=logs["grad_norm"],
            learning_rate=logs["learning_rate"],
            tokens=int(state.num_input_tokens_seen),
            seconds=round(self._clock(), 3),
            peak_bytes=peak_bytes,
            held_out=logs.get("eval_loss"),
        )
        saves, stops = over_all(self._tell(step), args.device, greatest=True)
        control.should_save |= bool(saves)
        control.should_training_stop |= bool(stops)


class CallMethod(TrainerCallback):
    """Calls the hooks around the optimizer step, where transformers' Trainer calls callbacks only."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Make the hooks, now that the number of steps is known."""
        del control, kwargs
        self.trainer.start_hooks(Course(state.max_steps, args.learning_rate, partial(forget, self.trainer.optimizer)))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        del args, state, control, kwargs
        self.trainer.hooks.end()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        del args, control
        self.trainer.hooks.transform_grads(state.global_step + 1)
        if self.trainer.preconditioner is not None:
            self.trainer.preconditioner.transform_grads()
        optimizer = kwargs["optimizer"]  # accelerate wraps it
        self.trainer.rounding.before_step(getattr(optimizer, "optimizer", optimizer), state.global_step + 1)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        del args, control, kwargs
        self.trainer.rounding.after_step()
        self.trainer.hooks.after_step(state.global_step + 1)


class SetRate(TrainerCallback):
    """Sets the learning rate of the first step: a checkpoint has that of the schedule before the run was extended."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        del args, state, control
        schedule, groups = kwargs["lr_scheduler"], kwargs["optimizer"].param_groups
        for group, rate, share in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
            group["lr"] = rate * share(schedule.last_epoch)
        schedule._last_lr = [group["lr"] for group in groups]  # what is logged


def best_of(steps: Iterable[Step]) -> Step | None:
    """Return the first step with the lowest held-out loss; None if none was measured."""
    measured = [step for step in steps if step.held_out is not None]
    return min(measured, key=lambda step: step.held_out or 0.0, default=None)


def has_stalled(steps: Sequence[Step], patience: int) -> bool:
    """Return whether the last `patience` measured losses are not below the lowest one before them."""
    best = best_of(steps)
    return (
        best is not None and sum(step.held_out is not None and step.number > best.number for step in steps) >= patience
    )


def peak_bytes_of(device: torch.device) -> Callable[[], int]:
    """Return a function that returns the most memory so far, in bytes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return lambda: torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    with suppress(OSError):  # Linux forgets the peak before the run, such as that of quantizing
        Path("/proc/self/clear_refs").write_text("5")
    unit = 1 if sys.platform == "darwin" else 1024
    return lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# The memory of a run by item.


PLANNED = {  # item of the table -> items of the plan
    "residual": ("residual codes", "residual scales", "page slots"),
    "frozen components": ("frozen components",),
    "embeddings, norms, head": ("embeddings", "output head", "experts in 16 bits", "norms and the rest"),
    "trained parameters": ("trained parameters",),
    "gradients": ("gradients",),
    "optimizer state": ("optimizer state",),
}
REST, PEAK = "activations and all else", "peak"
OUTSIDE = ("CUDA context", "reserve")  # torch does not measure these


def memory_by_item(model: Any, optimizer: Any, peak_bytes: int, libraries: int) -> dict[str, int]:
    """Return bytes by item on the device, in the order of the table: items, the rest up to the peak, the peak.

    Args:
        libraries: Bytes of the process before the model was loaded; 0 for a GPU.
    """
    linears = [module for _, module in split_linears(model)]
    caches = {id(linear.paged.cache): linear.paged.cache for linear in linears if linear.paged is not None}
    packed = {id(buffer) for linear in linears for buffer in linear.buffers(recurse=False)}
    inside = {id(buffer) for linear in linears for buffer in linear.adapter.buffers()}
    buffers = list(model.buffers())
    parameters = list(model.parameters())
    shared = {id(page) for cache in caches.values() if isinstance(cache, ShardedPages) for page in cache.pages()}
    frozen = [p for p in parameters if not p.requires_grad and id(p) not in shared]
    trained = sum(p.nbytes for p in parameters if p.requires_grad)
    states = optimizer.state.values() if optimizer is not None else ()
    items = {
        "residual": _bytes(b for b in buffers if id(b) in packed) + sum(cache.num_bytes for cache in caches.values()),
        "frozen components": _bytes(b for b in buffers if id(b) in inside),
        "embeddings, norms, head": _bytes([*frozen, *(b for b in buffers if id(b) not in packed | inside)]),
        "trained parameters": trained,
        "gradients": trained,
        "optimizer state": _bytes(t for state in states for t in state.values() if isinstance(t, Tensor)),
    }
    return _with_rest(items, peak_bytes, libraries)


def planned_by_item(plan: MemoryPlan, *, on_gpu: bool, libraries: int) -> dict[str, int]:
    """Return the bytes of the same items by the plan."""
    found = {item.name: item.gpu if on_gpu else item.host for item in plan.items if item.name not in OUTSIDE}
    items = {name: sum(found.get(part, 0) for part in parts) for name, parts in PLANNED.items()}
    return _with_rest(items, sum(found.values()) + libraries, libraries)


def _with_rest(items: dict[str, int], peak: int, libraries: int) -> dict[str, int]:
    if libraries:
        items = items | {"libraries": libraries}
    return items | {REST: max(peak - sum(items.values()), 0), PEAK: peak}


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
