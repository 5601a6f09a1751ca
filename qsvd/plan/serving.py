"""Bytes of generating text from a split model: what is frozen, and the keys and values of the tokens."""

from dataclasses import replace

from qsvd.plan.activations import Batch, run_blocks
from qsvd.plan.frozen import context_item, context_notes, dense_items, residual_items
from qsvd.plan.memory import Limits, MemoryPlan, items_of, on
from qsvd.plan.pages import Placement
from qsvd.plan.split_model import SplitModelPlan
from qsvd.plan.tensors import total_bytes


def plan_serving(model: SplitModelPlan, batch: Batch, placement: Placement, limits: Limits) -> MemoryPlan:
    """What is where while the last token of so many sequences of so many tokens is made.

    Raises:
        ValueError: the model cannot be run from tokens alone.
    """
    device = batch.device
    blocks = run_blocks(model, replace(batch, checkpointing=True))
    peak = max((block.forward for block in blocks), key=lambda peak: peak.total)
    adapters = total_bytes(model.parameters) + model.buffers
    text = model.text_config
    items = [
        *residual_items(model, placement, device),
        *dense_items(model, placement, device),
        on(device, "components and adapters", adapters),
        on(device, "keys and values", cache_bytes(model, batch)),
        on(device, "activations of one block", blocks[0].around + blocks[0].input + peak.total - peak.decoding),
        on(device, "decode workspace", peak.decoding),
        on(device, "logits of the last token", 4 * batch.batch * text.vocab_size),
        context_item(device),
    ]
    notes = ("All tokens but one are taken to be the prompt, read in one go.", *context_notes(device))
    return MemoryPlan("serve", items_of(items, device), limits, notes)


def cache_bytes(model: SplitModelPlan, batch: Batch) -> int:
    """Of keys and values of all tokens in all blocks; windows of sliding attention are not taken off."""
    text = model.text_config
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * len(model.blocks) * heads * width * model.dtype.itemsize * batch.tokens * batch.batch
