"""Where the bytes of a training run are, as they were found and as they were planned."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from qsvd.adapters.model import split_linears
from qsvd.plan.memory import MemoryPlan

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
    pagers = {id(linear.paged.pager): linear.paged.pager for linear in linears if linear.paged is not None}
    packed = {id(buffer) for linear in linears for buffer in linear.buffers(recurse=False)}
    inside = {id(buffer) for linear in linears for buffer in linear.adapter.buffers()}
    buffers = list(model.buffers())
    parameters = list(model.parameters())
    frozen = [p for p in parameters if not p.requires_grad]
    trained = sum(p.nbytes for p in parameters if p.requires_grad)
    states = optimizer.state.values() if optimizer is not None else ()
    items = {
        "residual": _bytes(b for b in buffers if id(b) in packed) + sum(p.num_bytes for p in pagers.values()),
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
