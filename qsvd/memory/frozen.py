"""Bytes of the frozen tensors for one placement: residuals and their pages, embeddings, head and the rest."""

from qsvd.memory.items import RESERVE, SIXTEEN_BITS, Item, Placement, num_slots, on, resident_blocks
from qsvd.memory.split_model import SplitModelPlan

GATHERED = 3  # blocks of a divided model on a device: one computes, the next one arrives, and the piece it arrives in
CONTEXT = 600_000_000  # bytes of the CUDA context, an assumption
WORKSPACES = 2 * 32 * 2**20  # of cuBLAS, on Hopper, where they are largest: for the main thread and for autograd's


def residual_items(model: SplitModelPlan, placement: Placement, device: str) -> list[Item]:
    """Return the resident residuals, the buffers for pages, and the pages in CPU memory."""
    if placement.shards:
        return _sharded_items(model, placement, device)
    resident = resident_of(model, placement)
    here = [block for number, block in enumerate(model.blocks) if number in resident]
    pages = [block.page for number, block in enumerate(model.blocks) if number not in resident]
    slots = num_slots(len(pages)) * max(pages, default=0)
    staging = slots if placement.pages == "disk" and device == "cuda" else 0  # pinned, between disk and GPU
    return [
        on(device, "residual codes", sum(block.codes for block in here)),
        on(device, "residual scales", sum(block.scales for block in here)),
        on(device, "page slots", slots),
        Item("pages", host=sum(pages) if placement.pages == "host" else staging),
    ]


def _sharded_items(model: SplitModelPlan, placement: Placement, device: str) -> list[Item]:
    """Return the part of this process of every block, and the blocks that are whole at a time."""
    parts = [-(-block.page // placement.shards) for block in model.blocks]
    pinned = sum(1 << (part - 1).bit_length() for part in parts)  # torch rounds each up to a power of two
    gathered = (GATHERED + (device == "cpu")) * max(block.page for block in model.blocks)  # a CPU decodes a copy
    is_here = placement.resident is None
    return [
        on(device, "residual codes", sum(parts) if is_here else 0),
        on(device, "page slots", gathered),
        Item("pages", host=0 if is_here else pinned),
    ]


def dense_items(model: SplitModelPlan, placement: Placement, device: str, *, has_head: bool = True) -> list[Item]:
    """Return the tensors that are not quantized, and the quantized model on disk.

    Args:
        has_head: Whether the output head is loaded: not for a classifier of a language model.
    """
    dense = model.dense
    return [
        on("cpu" if placement.embeddings_on_host else device, "embeddings", dense.embeddings),
        on(device, "output head", dense.head if has_head else 0),
        on(device, "experts in 16 bits", dense.experts),
        on(device, "norms and the rest", dense.rest),
        Item("base", disk=base_bytes(model)),
    ]


def resident_of(model: SplitModelPlan, placement: Placement) -> frozenset[int]:
    """Return the numbers of the blocks whose residuals are kept on the device."""
    every = len(model.blocks)
    return resident_blocks(every, every if placement.resident is None else placement.resident)


def base_bytes(model: SplitModelPlan) -> int:
    """Return the bytes of a quantized model on disk, without its small files."""
    choices = model.allocation.choices
    factors = sum(choices[spec.module].rank * sum(spec.shape) for spec in model.names.weights)
    return sum(block.residual for block in model.blocks) + model.dense.total + SIXTEEN_BITS * factors


def library_items(device: str) -> list[Item]:
    """Return what libraries take on a GPU."""
    on_gpu = device == "cuda"
    return [
        Item("CUDA context", gpu=CONTEXT if on_gpu else 0),
        Item("cuBLAS workspaces", gpu=WORKSPACES if on_gpu else 0),
    ]


def context_notes(device: str) -> tuple[str, ...]:
    """Return the assumptions about a GPU."""
    if device != "cuda":
        return ()
    return (
        f"The CUDA context takes {CONTEXT / 1e9:g} GB (assumed), workspaces of cuBLAS {WORKSPACES / 1e9:.2f} GB.",
        f"{RESERVE:.0%} is reserved for fragmentation and untracked memory (assumed).",
    )
