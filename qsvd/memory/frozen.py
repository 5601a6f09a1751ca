"""Bytes of what never changes, for one placement: residuals and their pages, embeddings, head and the rest."""

from qsvd.memory.items import RESERVE, Item, Placement, num_slots, on, resident_blocks
from qsvd.memory.split_model import SplitModelPlan

CONTEXT = 600_000_000  # bytes of CUDA itself, its libraries and their workspaces: an assumption
STORED = 2  # bytes of a number of the stored factors


def residual_items(model: SplitModelPlan, placement: Placement, device: str) -> list[Item]:
    """What of the residuals stays, the places for visitors, and where those wait."""
    staying = staying_blocks(model, placement)
    here = [block for number, block in enumerate(model.blocks) if number in staying]
    pages = [block.page for number, block in enumerate(model.blocks) if number not in staying]
    slots = num_slots(len(pages)) * max(pages, default=0)
    ring = slots if placement.pages == "disk" and device == "cuda" else 0
    return [
        on(device, "residual codes", sum(block.codes for block in here)),
        on(device, "residual scales", sum(block.scales for block in here)),
        on(device, "page slots", slots),
        Item("pages", host=sum(pages) if placement.pages == "host" else ring),
    ]


def dense_items(model: SplitModelPlan, placement: Placement, device: str) -> list[Item]:
    """What is not split, and the whole base on disk."""
    dense = model.dense
    embeddings = on("cpu" if placement.embeddings_on_host else device, "embeddings", dense.embeddings)
    return [
        embeddings,
        on(device, "output head", dense.head),
        on(device, "experts in 16 bits", dense.experts),
        on(device, "norms and the rest", dense.rest),
        Item("base", disk=base_bytes(model)),
    ]


def staying_blocks(model: SplitModelPlan, placement: Placement) -> frozenset[int]:
    """Numbers of the blocks whose residuals stay on the device."""
    every = len(model.blocks)
    return resident_blocks(every, every if placement.resident is None else placement.resident)


def base_bytes(model: SplitModelPlan) -> int:
    """Bytes of a result of `qsvd quantize` on disk, its small files not counted."""
    choices = model.allocation.choices
    factors = sum(choices[spec.module].rank * sum(spec.shape) for spec in model.names.weights)
    return sum(block.residual for block in model.blocks) + model.dense.total + STORED * factors


def context_item(device: str) -> Item:
    """Of CUDA, where it is used."""
    return Item("CUDA context", gpu=CONTEXT if device == "cuda" else 0)


def context_notes(device: str) -> tuple[str, ...]:
    """What is assumed of it."""
    if device != "cuda":
        return ()
    return (
        f"CUDA itself is taken to need {CONTEXT / 1e9:g} GB: an assumption.",
        f"{RESERVE:.0%} is kept free, for holes between tensors and for what no plan sees: an assumption.",
    )
