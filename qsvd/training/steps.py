"""What is known of each optimizer step while a run goes on."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qsvd.adapters.model import split_linears
from qsvd.memory.items import MemoryPlan


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


# Where the bytes of a training run are, as they were found and as they were planned.


PLANNED = {  # item of a table -> items of the plan
    "residual": ("residual codes", "residual scales", "page slots"),
    "frozen components": ("frozen components",),
    "embeddings, norms, head": ("embeddings", "output head", "experts in 16 bits", "norms and the rest"),
    "trained parameters": ("trained parameters",),
    "gradients": ("gradients",),
    "optimizer state": ("optimizer state",),
}
REST, PEAK = "activations and all else", "peak"
OUTSIDE = ("CUDA context", "reserve")  # not torch's, which is who measures


def memory_by_item(model: Any, optimizer: Any, peak_bytes: int, libraries: int) -> dict[str, int]:
    """Bytes by item, on the device, in the order of a table; before the peak comes what it has beyond the others.

    Args:
        libraries: Bytes of the process before the model came, 0 for a GPU.
    """
    linears = [module for _, module in split_linears(model)]
    caches = {id(linear.paged.cache): linear.paged.cache for linear in linears if linear.paged is not None}
    packed = {id(buffer) for linear in linears for buffer in linear.buffers(recurse=False)}
    inside = {id(buffer) for linear in linears for buffer in linear.adapter.buffers()}
    buffers = list(model.buffers())
    parameters = list(model.parameters())
    frozen = [p for p in parameters if not p.requires_grad]
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
    """The same items by the plan."""
    found = {item.name: item.gpu if on_gpu else item.host for item in plan.items if item.name not in OUTSIDE}
    items = {name: sum(found.get(part, 0) for part in parts) for name, parts in PLANNED.items()}
    return _with_rest(items, sum(found.values()) + libraries, libraries)


def _with_rest(items: dict[str, int], peak: int, libraries: int) -> dict[str, int]:
    if libraries:
        items = items | {"libraries": libraries}
    return items | {REST: max(peak - sum(items.values()), 0), PEAK: peak}


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
