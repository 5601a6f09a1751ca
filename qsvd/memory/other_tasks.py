"""Bytes of `qsvd quantize` at its largest weight, and of generating text."""

import math
from collections import Counter
from dataclasses import replace
from typing import Literal

from qsvd.decompose.alternate import STACK
from qsvd.memory.block_bytes import Batch, run_blocks
from qsvd.memory.frozen import base_bytes, context_notes, dense_items, library_items, residual_items
from qsvd.memory.items import SIXTEEN_BITS, Item, Limits, MemoryPlan, Placement, items_of, on
from qsvd.memory.split_model import SplitModelPlan
from qsvd.numerics.norms import EXACT_SIDE, PROBES, STEPS
from qsvd.numerics.svd import OVERSAMPLE, OVERSAMPLE_SHARE
from qsvd.plan.allocation import Choice
from qsvd.plan.tensors import total_bytes

Weighing = Literal["none", "inputs", "both"]  # whose second moments weight errors: those of gradients, too
COPIES = 2  # float32 matrices at once: the weight, and the weight minus its residual or components
SKETCHES = 4  # tall float32 matrices at once in the randomized SVD
SHARD = 5 * 10**9  # bytes of an output file


def plan_quantizing(model: SplitModelPlan, device: str, limits: Limits) -> MemoryPlan:
    """Return the bytes while the largest weight is quantized and measured, on "cuda" or "cpu"."""
    choices = model.all_choices
    alike = Counter((spec.shape, choice.codec.name, choice.rank) for spec, choice in choices.items())
    counts = {
        spec: min(alike[spec.shape, choice.codec.name, choice.rank], STACK[device] // math.prod(spec.shape) or 1)
        for spec, choice in choices.items()
    }
    largest = max(choices, key=lambda spec: counts[spec] * math.prod(spec.shape))
    factors = base_bytes(model) - model.dense.total - sum(block.residual for block in model.blocks)
    items = [
        *_memory_items(largest.shape, choices[largest], device, counts[largest]),
        Item("residual", disk=sum(block.residual for block in model.blocks)),
        Item("embeddings, norms, head", disk=model.dense.total),
        Item("factors, there twice while they are collected", disk=2 * factors),
        Item("one shard, there twice while it is written", disk=min(SHARD, base_bytes(model))),
    ]
    stack = f", and is split with {counts[largest] - 1} others" if counts[largest] > 1 else ""
    notes = (f"The largest weight is {largest.module}, {largest.shape[0]:,} x {largest.shape[1]:,}{stack}.",)
    notes += context_notes(device)
    if model.dense.experts:
        notes += ("Experts that are not quantized stay in 16 bits.",)
    return MemoryPlan("quantize", items_of(items, device), limits, notes)


def plan_splitting(  # noqa: PLR0913  # what is planned, and where
    shape: tuple[int, int],
    choice: Choice,
    device: str,
    limits: Limits,
    *,
    count: int = 1,
    weighted: bool = False,
    feeds_back: bool = False,
    moments: Weighing = "none",
    block: int = 0,
    copied: int = 0,
) -> MemoryPlan:
    """Return the bytes in memory while a weight of this shape, the largest of its model, is quantized and measured.

    Args:
        count: Weights that are split together.
        weighted: Whether errors are weighted by statistics, which takes a scaled copy.
        feeds_back: Whether residuals are rounded with error feedback, one matrix after another.
        moments: Whose second moments weight the errors.
        block: Bytes of the largest block and of the statistics of its layers.
        copied: Bytes of the largest tensor that is copied whole, while the next weights are split.
    """
    items = [
        *_memory_items(shape, choice, device, count, COPIES + weighted),
        on(device, "error feedback", _feedback_bytes(shape, choice, count) if feeds_back else 0),
        on(device, "second moments", _moments_bytes(shape, moments, feeds_back=feeds_back)),
        on(device, "a block and the statistics of its layers", block),
        Item("a tensor that is copied", host=copied),
    ]
    return MemoryPlan("quantize", items_of(items, device), limits)


def _memory_items(shape: tuple[int, int], choice: Choice, device: str, count: int, copies: int = COPIES) -> list[Item]:
    numbers = count * math.prod(shape)
    return [
        on(device, "largest weight, as it is stored", SIXTEEN_BITS * numbers),
        on(device, "float32 copies of it", 4 * copies * numbers),
        on(device, "its residual, kept and new", 2 * count * choice.codec.num_bytes(shape)),
        on(device, "singular vectors and probes", _vectors_bytes(shape, choice, count)),
        Item("weights that are read", host=(2 if device == "cuda" else 1) * SIXTEEN_BITS * numbers),
        # a GPU's results are copied before they wait
        Item("weights that are written", host=waiting_bytes(shape, choice, count + (device == "cuda"))),
        *library_items(device),
    ]


def _feedback_bytes(shape: tuple[int, int], choice: Choice, count: int) -> int:
    """Return the bytes of the codes, and of two float32 copies of a matrix beside a second moment and its factor, which
    is there twice while it is made; without those of singular vectors and probes, which are gone by then."""
    numbers, moment = math.prod(shape), shape[1] ** 2
    return max(numbers + 4 * (2 * numbers + 3 * moment) - _vectors_bytes(shape, choice, count), 0)


def _vectors_bytes(shape: tuple[int, int], choice: Choice, count: int) -> int:
    return max(count * _sketch(shape, choice.rank), _probes(shape, count))


def _moments_bytes(shape: tuple[int, int], moments: Weighing, *, feeds_back: bool) -> int:
    """Return what the second moments of inputs and gradients take more, float32: each as it was given and its root.

    While a root is made, or an error is measured, there is one more matrix. In the rounding there are what errors of
    rows meet, its factor, and a third copy of the matrix.
    """
    if moments == "none":
        return 0
    inputs, outputs, numbers = shape[1] ** 2, shape[0] ** 2 if moments == "both" else 0, math.prod(shape)
    kept = 2 * (inputs + outputs)
    if not feeds_back:
        return 4 * (kept + max(numbers, inputs, outputs))
    return 4 * (kept + (2 * outputs + max(numbers - inputs, 0) if moments == "both" else 0))


def waiting_bytes(shape: tuple[int, int], choice: Choice, count: int) -> int:
    """Return the bytes of the split weights that wait until they are written: so many of this shape."""
    return count * (choice.codec.num_bytes(shape) + SIXTEEN_BITS * choice.rank * sum(shape))


def _sketch(shape: tuple[int, int], rank: int) -> int:
    columns = rank + max(OVERSAMPLE, rank // OVERSAMPLE_SHARE) if rank else 0
    return 4 * SKETCHES * columns * max(shape)


def _probes(shape: tuple[int, int], count: int) -> int:
    """Return the bytes of a nuclear norm, exact for small matrices and estimated for others."""
    short = min(shape)
    return count * 8 * 3 * short**2 if short <= EXACT_SIDE else 4 * PROBES * max(STEPS) * short


def plan_serving(
    model: SplitModelPlan, batch: Batch, placement: Placement, limits: Limits, *, has_head: bool = True
) -> MemoryPlan:
    """Return the bytes while the last token of every sequence of the batch is generated.

    Args:
        has_head: Whether there is an output head: not in a classifier of a language model.

    Raises:
        BadInput: the model cannot be run from tokens alone.
    """
    device = batch.device
    blocks = run_blocks(model, replace(batch, checkpointing=True), "none")
    peak = max((block.forward for block in blocks), key=lambda peak: peak.total)
    adapters = total_bytes(model.parameters) + model.buffers
    text = model.text_config
    items = [
        *residual_items(model, placement, device),
        *dense_items(model, placement, device, has_head=has_head),
        on(device, "components and adapters", adapters),
        on(device, "keys and values", cache_bytes(model, batch)),
        on(device, "activations of one block", blocks[0].around + blocks[0].input + peak.total - peak.decoding),
        on(device, "decode workspace", peak.decoding),
        on(device, "logits of the last token", 4 * batch.batch * text.vocab_size if has_head else 0),
        *library_items(device),
    ]
    notes = ("All tokens but the last are the prompt and are read in one pass (assumed).", *context_notes(device))
    return MemoryPlan("serve", items_of(items, device), limits, notes)


def cache_bytes(model: SplitModelPlan, batch: Batch) -> int:
    """Return the bytes of the keys and values of all tokens in all blocks, as if no attention had a window."""
    text = model.text_config
    queries = getattr(text, "num_attention_heads", None)
    if queries is None:  # a recurrent model keeps a state, which does not grow
        return 0
    heads = getattr(text, "num_key_value_heads", None) or queries
    width = getattr(text, "head_dim", None) or text.hidden_size // queries
    return 2 * len(model.language_blocks) * heads * width * model.dtype.itemsize * batch.tokens * batch.batch
