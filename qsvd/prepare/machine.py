"""The planner asked about this machine: what of a model stays on the device, and whether a run fits at all."""

import hashlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from qsvd.adapters.start import planned_base
from qsvd.errors import BadInput, DoesNotFit, parse_size, show_size
from qsvd.files.adapter import AdapterRecord
from qsvd.files.pages import free_host_memory, taken_host_memory
from qsvd.files.split_folder import SplitFolder
from qsvd.memory.block_bytes import Batch
from qsvd.memory.items import Limits, MemoryPlan, Placement, block_of, on
from qsvd.memory.placement import Placed, Wish, place, place_serving
from qsvd.memory.reach import longest
from qsvd.memory.training import Training
from qsvd.plan.weights import WeightSpec


@dataclass(frozen=True)
class Machine:
    """Where a run is to fit.

    Args:
        device: That computes.
        dtype: To compute in.
        limits: Bytes that it may take, beside what the process has already.
    """

    device: torch.device
    dtype: torch.dtype
    limits: Limits


def machine(device: torch.device, dtype: torch.dtype, *, gpu: str | None = None, host: str | None = None) -> Machine:
    """What is free here, or less if less is given.

    Raises:
        BadInput: a size cannot be read, or is of a GPU where none computes.
    """
    if gpu is not None and device.type != "cuda":
        raise BadInput(f"--gpu {gpu} is for a GPU, and the device is {device}")
    free_gpu = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    most_gpu = _least(None if gpu is None else parse_size(gpu, "--gpu"), free_gpu)
    left = None if host is None else max(parse_size(host, "--host") - taken_host_memory(), 0)
    most_host = _least(left, free_host_memory())
    return Machine(device, dtype, Limits(most_gpu, most_host))


def _least(*sizes: int | None) -> int | None:
    return min((size for size in sizes if size is not None), default=None)


def place_training(split: SplitFolder, record: AdapterRecord, training: Training, wish: Wish, there: Machine) -> Placed:
    """What stays on the device during a run.

    Raises:
        DoesNotFit: nothing that was tried fits; the sentence has the numbers, and what would fit.
        BadInput: the planner cannot run such a model.
    """
    model = planned_base(split, record, there.dtype)
    found = place(model, training, there.limits, wish)
    if found.memory.fits:
        return found
    tokens = longest(model, training, there.limits, wish, training.batch.tokens)
    change = f"--max-length {tokens} would fit" if tokens else "no length would fit: take a smaller base or more memory"
    raise DoesNotFit(f"{_lack(found.memory)}; {change}")


def place_reading(split: SplitFolder, record: AdapterRecord, batch: Batch, wish: Wish, there: Machine) -> Placement:
    """What stays on the device while a model reads batches; a language model gives the logits of every token.

    Raises:
        DoesNotFit, ValueError: as place_training.
    """
    model = planned_base(split, record, there.dtype)
    choices = 0 if record.labels else model.text_config.vocab_size
    logits = 2 * there.dtype.itemsize * batch.batch * batch.tokens * choices  # and a copy of them
    beside = on(there.device.type, "logits of every token", logits)
    left = (
        None if size is None else size - taken
        for size, taken in ((there.limits.gpu, beside.gpu), (there.limits.host, beside.host))
    )
    found = place_serving(model, batch, Limits(*left), wish)
    memory = replace(found.memory, items=(*found.memory.items, beside), limits=there.limits)
    if not memory.fits:
        raise DoesNotFit(f"{_lack(memory)}; give a smaller --batch-size or --window")
    return found.placement


def show_placement(placement: Placement, split: SplitFolder) -> str:
    """What of the 4-bit weights stays on the device, in words."""
    blocks = num_blocks(split)
    if placement.resident in (None, blocks):
        return f"all {blocks} blocks"
    where = {"host": "in host memory", "disk": "on disk"}[placement.pages]
    return f"{placement.resident} of {blocks} blocks, the others {where}"


def num_blocks(split: SplitFolder) -> int:
    """Blocks that have split weights."""
    return len({block_of(weight["module"]) for weight in split.weights.values()})


def _lack(plan: MemoryPlan) -> str:
    """Where it lacks, in words."""
    names = {"gpu": "GPU memory", "host": "host memory", "disk": "disk"}
    return "the run needs " + ", and ".join(
        f"{show_size(plan.total(where))} of {names[where]}, where {show_size(getattr(plan.limits, where))} may be used"
        for where in plan.lacking
    )


# What the card here does in a second, for estimates: products in 16 bits, and copies from pinned host memory.


SIDE = 8192  # of the matrices that are multiplied
COPIED = 1 << 28  # bytes
REPEATS = 5


def measured_flops() -> float:
    """Products and sums a second of square bfloat16 matrices."""
    left, right = (torch.randn(SIDE, SIDE, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 2 * SIDE**3 / _median(lambda: left @ right)


def measured_link() -> float:
    """Bytes a second from pinned host memory to the card."""
    source, target = torch.empty(COPIED, dtype=torch.uint8).pin_memory(), torch.empty(COPIED, dtype=torch.uint8).cuda()
    return COPIED / _median(lambda: target.copy_(source, non_blocking=True))


def _median(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(REPEATS + 1):
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


# Seeds of single weights.


def seed_of(seed: int, spec: WeightSpec) -> int:
    """A seed for this weight alone, so that neither the order nor a resumed run changes its sketch."""
    return int.from_bytes(hashlib.sha256(f"{seed} {spec.module}".encode()).digest()[:6])
