"""Layer-major accumulation: a block sees all micro-batches of a step before the next block sees any.

The whole step goes through the model as one batch, which every block divides: each part is computed, and in the
backward pass recomputed, by itself, so that one part's activations are in memory at a time, while a page is visited
once for all of them. What grows is the checkpoints, one for each row of the step.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor


def in_micro_batches(rows: int, checkpoint: Callable[..., Any], block: Any, *inputs: Any) -> Any:
    """What a block returns for a batch, computed for so many rows at a time.

    Args:
        checkpoint: As torch.utils.checkpoint.checkpoint: a function and its inputs.
        block: A partial of the block's forward that holds its keyword arguments, as transformers gives it.
        inputs: Its positional arguments, the hidden states [batch, tokens, hidden] first. Of all arguments, tensors
            with as many rows as these are divided, the others are the same for every part.
    """
    total = len(inputs[0])
    if total <= rows:
        return checkpoint(block, *inputs)
    outputs = []
    for start in range(0, total, rows):
        named = {name: _rows(value, total, start, start + rows) for name, value in block.keywords.items()}
        part = partial(block.func, *block.args, **named)
        outputs.append(checkpoint(part, *(_rows(value, total, start, start + rows) for value in inputs)))
    return _joined(outputs, rows)


def _rows(value: Any, total: int, start: int, stop: int) -> Any:
    """Of a tensor, or of the tensors in a tuple, what belongs to these rows of the batch."""
    if isinstance(value, Tensor):
        return value[start:stop] if value.ndim and len(value) == total else value
    if isinstance(value, tuple):
        return tuple(_rows(one, total, start, stop) for one in value)
    return value


def _joined(outputs: list[Any], rows: int) -> Any:
    """The parts' outputs as the whole batch's: tensors one below the other, in tuples where there are some.

    A tensor of one row from parts of several, as T5's position bias, is the same for all of them.
    """
    first = outputs[0]
    if isinstance(first, tuple):
        return tuple(_joined(list(one), rows) for one in zip(*outputs, strict=True))
    if not isinstance(first, Tensor) or (first.ndim and len(first) == 1 != rows):
        return first
    return torch.cat(outputs)
