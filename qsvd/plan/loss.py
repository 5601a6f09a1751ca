"""Bytes of the loss: TRL's chunked log-probabilities, never all logits (kernels/chunked_logprob.py of 1.16)."""

from dataclasses import dataclass

import torch

ROWS, COLUMNS = 4096, 32768  # of the tile of logits; it is made whole, even for a smaller vocabulary
VECTORS = 10  # float32 numbers kept for each token: maxima, sums, labels
TILE_WORK = 29  # bytes an element that torch makes of a tile on a CPU; on a GPU one kernel does it in place


@dataclass(frozen=True)
class LossBytes:
    """Bytes from the last hidden state to its gradient.

    Args:
        kept: From the forward pass on: the hidden states that are scored, and a few numbers for each.
        peak: Beside those, the most of the backward pass.
    """

    kept: int
    peak: int


def loss_bytes(tokens: int, batch: int, hidden: int, vocabulary: int, *, dtype: torch.dtype, device: str) -> LossBytes:
    """Of so many tokens, each of them scored; on a CPU with torch's operations instead of one kernel."""
    scored, columns = (tokens - 1) * batch, min(vocabulary, COLUMNS)
    rows = min(scored, ROWS)
    copied = device == "cuda" or batch > 1  # else a view
    states = scored * hidden
    is_short = dtype != torch.float32
    work = 0
    if device == "cpu":
        exact = 4 * (rows + hidden) * columns if is_short else 0  # float32 copies of the tile and of its weights
        work = max(TILE_WORK * rows * columns, exact)
    rounded = dtype.itemsize * states if is_short else 0  # of the gradient, while the tile is still there
    kept = 4 * VECTORS * scored + (dtype.itemsize * states if copied else 0)
    return LossBytes(kept, 4 * states + rows * COLUMNS * dtype.itemsize + max(work, rounded))
