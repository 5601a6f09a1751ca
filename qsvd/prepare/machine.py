"""This machine: free memory, whether a run fits, which blocks stay on the device, how fast the GPU is."""

import hashlib
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

import torch

from qsvd import ranks
from qsvd.adapters.start import planned_base
from qsvd.errors import BadInput, DoesNotFit, parse_size, show_size
from qsvd.files.adapter import AdapterRecord
from qsvd.files.split_folder import SplitFolder
from qsvd.files.workspace import check_space
from qsvd.memory.block_bytes import Batch
from qsvd.memory.device import device_of, dtype_of, free_host_memory, taken_host_memory
from qsvd.memory.encoder import EXACT, encoder_bytes
from qsvd.memory.items import Item, Limits, MemoryPlan, Placement, all_of, block_of, on
from qsvd.memory.placement import Placed, Wish, can_fit, fastest_batches, longest, place, place_serving
from qsvd.memory.split_model import SplitModelPlan
from qsvd.memory.training import Training
from qsvd.options import Train, TrainingOptions
from qsvd.plan.weights import WeightSpec
from qsvd.training.run_folder import Recorded
from qsvd.training.settings import default_optimizer

T = TypeVar("T", bound=TrainingOptions)


@dataclass(frozen=True)
class Machine:
    """Device, compute dtype, and the bytes that a run may take in addition to those of the process."""

    device: torch.device
    dtype: torch.dtype
    limits: Limits


def machine(device: torch.device, dtype: torch.dtype, *, gpu: str | None = None, host: str | None = None) -> Machine:
    """Return this machine with its free memory, or less if --gpu or --host say less; a BadInput for wrong sizes."""
    if gpu is not None and device.type != "cuda":
        raise BadInput(f"--gpu {gpu} needs a GPU, and the device is {device}")
    most_gpu = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    if gpu is not None and most_gpu is not None:
        most_gpu = min(most_gpu, parse_size(gpu, "--gpu"))
    most_host = free_host_memory()
    if host is not None:
        most_host = min(most_host, max(parse_size(host, "--host") - taken_host_memory(), 0))
    return Machine(device, dtype, Limits(most_gpu, most_host))


def train_machine(options: Train) -> Machine:
    """Return this machine, as far as the options let a run use it."""
    device = device_of(options.device)
    return machine(device, dtype_of(options.dtype, device), gpu=options.gpu, host=options.host)


def check_offload(options: Train, device: torch.device) -> None:
    """Refuse to offload where there is no GPU."""
    if options.shard == "offload" and device.type == "cpu":
        raise BadInput("--shard offload needs a GPU; on a CPU the parts are in CPU memory already: give --shard yes")
    if options.activation_offload == "yes" and device.type == "cpu":
        raise BadInput("--activation-offload yes needs a GPU; on a CPU the activations are in CPU memory already")


def place_training(
    model: SplitModelPlan, training: Training, wish: Wish, here: Machine, *, must_fit: bool = True
) -> Placed:
    """Return which blocks stay on the device during training; a DoesNotFit has the numbers, and what would fit.

    Args:
        must_fit: False returns the nearest placement where none fits.
    """
    found = place(model, training, here.limits, wish)
    if found.memory.fits or not must_fit:
        return found
    if wish.unrecomputed not in ("auto", 0) and can_fit(model, training, here.limits, replace(wish, unrecomputed=0)):
        raise DoesNotFit(
            f"{_lack(found.memory)}; the run has kept the activations of {wish.unrecomputed} of {len(model.blocks)} "
            "blocks so far, and would fit with --gradient-checkpointing, which recomputes them"
        )
    tokens = longest(model, training, here.limits, wish, training.batch.tokens)
    if wish.shards:
        more = "start more processes" if wish.offloads_parts else "start more processes, or give --shard offload"
        raise DoesNotFit(f"{_lack(found.memory)}; {more}" + (f", or --max-length {tokens}" if tokens else ""))
    change = f"--max-length {tokens} would fit" if tokens else "no length would fit: use a smaller model or more memory"
    raise DoesNotFit(f"{_lack(found.memory)}; {change}")


def training_of(options: TrainingOptions, tokens: int, device: torch.device, *, is_even: bool = False) -> Training:
    """Return a run with sequences of a length; `is_even` if all have it, so that none is padded.

    Of several processes it is the part of this one.
    """
    assert options.batch_size != "auto", "a number by now, see with_batches"
    accumulate = options.accumulate // ranks.size()
    rows = options.batch_size * (accumulate if options.layer_major else 1)  # padded to one length
    is_masked = options.packing or (rows > 1 and not is_even)
    batch = Batch(tokens, options.batch_size, is_masked, options.gradient_checkpointing != "no", device.type)
    optimizer = default_optimizer(device) if options.optimizer == "auto" else options.optimizer
    return Training(batch, accumulate, optimizer, options.layer_major)


SEQUENCES = 16  # of a step, where --step-tokens says nothing; 4 x 4, the default of the numbers, is the same


def with_batches(  # what is divided, by what, and where
    options: T, model: SplitModelPlan, run_of: Callable[[T], Training], length: float, wish: Wish, here: Machine
) -> T:
    """Return the options with numbers for --batch-size auto. The sequences of a step depend on no machine.

    Args:
        run_of: Returns the run with options.
        length: Tokens of a sequence, on average.
    """
    if options.batch_size != "auto":
        check_divided(options)
        return options
    every = SEQUENCES if options.step_tokens is None else round_number(options.step_tokens / length)
    first, count = wish.batch_size, ranks.size()
    sizes = [size for size in range(every, 0, -1) if every % (size * count) == 0]
    sizes = [first] if first in sizes else sizes
    if not sizes:
        raise BadInput(
            f"{count} processes cannot divide the {every} sequences of a step: give --step-tokens or --accumulate so "
            f"that a step has a multiple of {count}"
        )
    ways = [replace(options, batch_size=size, accumulate=every // size, step_tokens=None) for size in sizes]
    runs = {run_of(way): way for way in ways}
    return runs[fastest_batches(model, list(runs), here.limits, wish)]


def check_divided(options: TrainingOptions) -> None:
    """Refuse a step whose batches several processes cannot divide."""
    assert options.batch_size != "auto", "a number by now, see with_batches"
    refuse_undivided(options.batch_size, options.accumulate, ranks.size())


def refuse_undivided(size: int, times: int, count: int) -> None:
    """Refuse a step of so many batches of a size that so many processes cannot divide."""
    if times % count == 0:
        return
    fits = [smaller for smaller in range(size, 0, -1) if size * times % (smaller * count) == 0]
    instead = f"give --accumulate {-(-times // count) * count}, or fewer processes"
    if fits:
        instead = f"give --batch-size {fits[0]} --accumulate {size * times // fits[0]}, the same step"
    raise BadInput(
        f"{count} processes divide the batches of a step among them, and --accumulate is {times}, not a multiple of "
        f"{count}; {instead}"
    )


def part_of(options: TrainingOptions, training: Training, count: int) -> Training:
    """Return what each of several processes computes of a run; with --batch-size auto, of smaller batches if need be.

    Raises:
        BadInput: they cannot divide the batches of a step.
    """
    size, times = training.batch.batch, training.accumulate
    if options.batch_size == "auto":
        size = next((less for less in range(size, 0, -1) if size * times % (less * count) == 0), size)
        times = training.batch.batch * times // size
    refuse_undivided(size, times, count)
    return replace(training, batch=replace(training.batch, batch=size), accumulate=times // count)


def show_batches(training: Training, length: float) -> str:
    """Return how a step is divided, in words; `length` is that of a sequence, on average."""
    size, times = training.batch.batch, training.accumulate * ranks.size()
    return (
        f"Batch: {size} x {times} sequences a step, about {size * times * length:,.0f} tokens (--batch-size {size} "
        f"--accumulate {times})"
    )


def round_number(wanted: float) -> int:
    """Return the nearest of 1, 2, 3, 4, 6, 8, 12, 16, ..., which have many divisors."""
    power = 2 ** max(math.floor(math.log2(max(wanted, 1))), 0)
    return min((power, power * 3 // 2, power * 2), key=lambda number: abs(number - wanted))


def wish_of(options: TrainingOptions, old: Recorded | None = None, *, is_labelled: bool) -> Wish:
    """Return what a run asks of its placement.

    Args:
        old: What was chosen when the run began; None for a new run.
        is_labelled: Whether it trains a classifier, whose trainer offloads no activations.
    """
    number: int | Literal["auto"] = 0  # "no" keeps all, see Batch.checkpointing
    if options.gradient_checkpointing == "auto":
        number = "auto" if old is None or old.unrecomputed is None else old.unrecomputed
    offload = "no" if is_labelled else options.activation_offload
    return Wish(options.resident, offload, number, None if old is None else old.batch_size)


def train_wish(options: Train, old: Recorded | None, *, is_labelled: bool) -> Wish:
    """Return what a run of `qsvd train` asks of its placement; its processes may hold the model together."""
    return divided(wish_of(options, old, is_labelled=is_labelled), options)


def divided(wish: Wish, options: Train) -> Wish:
    """Return the wish with the processes of --shard; refuse that for one process."""
    if options.shard == "no":
        return wish
    if ranks.size() == 1:
        raise BadInput(
            f"--shard {options.shard} divides the weights among several processes, and there is one: start "
            "`torchrun --nproc-per-node N -m qsvd train ...`, or leave it out"
        )
    return replace(wish, shards=ranks.size(), offloads_parts=options.shard == "offload")


def place_reading(  # what is planned, and where
    split: SplitFolder, record: AdapterRecord, batch: Batch, wish: Wish, here: Machine, *, pixels: int = 0
) -> Placement:
    """Return which blocks stay on the device while a model reads batches and returns the logits of every token.

    Args:
        pixels: Numbers that a processor makes of the images or sounds of a batch.
    """
    model = planned_base(split, record, here.dtype)
    choices = 0 if record.labels else model.text_config.vocab_size
    logits = 2 * here.dtype.itemsize * batch.batch * batch.tokens * choices  # and a copy of them
    numbers = EXACT * pixels + max(logits, encoder_bytes(model, pixels, batch.device))  # the encoder runs before
    item = on(here.device.type, "images, and their encoder or logits of every token", numbers)
    advice = "a smaller --batch-size or --window"
    return _placed_beside(item, model, batch, wish, here, advice, has_head=not record.labels)


def place_generating(  # what is planned, and where
    split: SplitFolder, record: AdapterRecord, batch: Batch, wish: Wish, here: Machine, *, pixels: int = 0
) -> Placement:
    """Return which blocks stay on the device while a model generates the last token of each sequence of a batch.

    Args:
        pixels: Numbers that a processor makes of the images of the batch.
    """
    model = planned_base(split, record, here.dtype)
    images = on(
        here.device.type, "images and their encoder", EXACT * pixels + encoder_bytes(model, pixels, batch.device)
    )
    return _placed_beside(images, model, batch, wish, here, "a smaller --max-new-tokens or a shorter prompt")


def _placed_beside(  # noqa: PLR0913  # what is planned, and where
    item: Item, model: SplitModelPlan, batch: Batch, wish: Wish, here: Machine, advice: str, *, has_head: bool = True
) -> Placement:
    """Return which blocks stay on the device beside these bytes; a DoesNotFit says what to give instead."""
    gpu, host = here.limits.gpu, here.limits.host
    left = Limits(None if gpu is None else gpu - item.gpu, None if host is None else host - item.host)
    found = place_serving(model, batch, left, wish, has_head=has_head)
    memory = replace(found.memory, items=(*found.memory.items, item), limits=here.limits)
    if not memory.fits:
        raise DoesNotFit(f"{_lack(memory)}; give {advice}")
    return found.placement


def show_placement(placement: Placement, split: SplitFolder) -> str:
    """Return in words which blocks stay on the device."""
    blocks = num_blocks(split)
    if placement.shards:
        where = "" if placement.resident is None else " in CPU memory"
        return f"1/{placement.shards} of each of {blocks} blocks{where}"
    if placement.resident in (None, blocks):
        return all_of(blocks)
    where = {"host": "in CPU memory", "disk": "on disk"}[placement.pages]
    return f"{placement.resident} of {blocks} blocks, the others {where}"


def num_blocks(split: SplitFolder) -> int:
    """Return the number of blocks that have split weights."""
    return len({block_of(weight["module"]) for weight in split.weights.values()})


def _lack(plan: MemoryPlan) -> str:
    """Return in words which memory is too small."""
    names = {"gpu": "GPU memory", "host": "CPU memory", "disk": "disk"}
    return "the run needs " + ", and ".join(
        f"{show_size(plan.total(where))} of {names[where]}, where {show_size(getattr(plan.limits, where))} may be used"
        for where in plan.lacking
    )


SIDE = 8192  # of the matrices that are multiplied
COPIED = 1 << 28  # bytes
REPEATS = 5


def measured_flops() -> float:
    """Measure the operations per second of a product of square bfloat16 matrices."""
    left, right = (torch.randn(SIDE, SIDE, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 2 * SIDE**3 / _median(lambda: left @ right)


def measured_link() -> float:
    """Measure the bytes per second from pinned CPU memory to the GPU."""
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


def seed_of(seed: int, spec: WeightSpec) -> int:
    """Return a seed for one weight, so that neither the order nor a resumed run changes its random sketch."""
    return int.from_bytes(hashlib.sha256(f"{seed} {spec.module}".encode()).digest()[:6])


def check_room(out: Path, num_bytes: int) -> None:
    """Refuse, by DoesNotFit, so many bytes in a folder; the bytes that are there already count."""
    check_space(out, num_bytes, "give --out another disk, a lower --rank or --budget, or a smaller --shard-size")
