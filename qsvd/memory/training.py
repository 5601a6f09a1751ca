"""Bytes of a training run at its worst moment, by item, for one placement of the frozen weights."""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from qsvd.memory.block_bytes import Batch, Peak, run_blocks
from qsvd.memory.frozen import context_item, context_notes, dense_items, residual_items
from qsvd.memory.items import Item, Limits, MemoryPlan, Placement, items_of, on
from qsvd.memory.split_model import SplitModelPlan
from qsvd.plan.tensors import OptimizerBytes, optimizer_bytes, total_bytes

# Bytes of the loss: TRL's chunked log-probabilities, never all logits (kernels/chunked_logprob.py of 1.16).


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


ROWS_OF_TOKENS = 24  # bytes of a token: its number, its label and its place in the mask, 64 bits each
KEPT_RUNS = 3  # checkpoints of a run on disk: two that stay and one that is being written
SLICES = 3  # gradients of all hidden states at once where a block divides them: what comes, what goes, one part's
AHEAD = 6  # checkpoints on the GPU at most while the others are on the host (TRL's max_fwd_stash_size is 5)


@dataclass(frozen=True)
class Training:
    """How to train.

    Args:
        batch: What goes through the model together.
        accumulate: Such batches in a step.
        optimizer: Its name in qsvd.
        layer_major: Whether a block takes all batches of a step before the next block does.
        has_loss: False leaves the output head and the loss out.
    """

    batch: Batch
    accumulate: int
    optimizer: str
    layer_major: bool = False
    has_loss: bool = True


@dataclass(frozen=True)
class Moment:
    """Bytes that come and go, at one moment of a step."""

    name: str
    checkpoints: int = 0
    gradients: int = 0
    block: int = 0
    decoding: int = 0
    loss: int = 0
    optimizer: int = 0

    @property
    def total(self) -> int:
        return self.checkpoints + self.gradients + self.block + self.decoding + self.loss + self.optimizer


def plan_training(model: SplitModelPlan, training: Training, placement: Placement, limits: Limits) -> MemoryPlan:
    """What is where when most is there.

    Raises:
        ValueError: the model cannot be run from tokens alone, or the optimizer is unknown.
    """
    device = training.batch.device
    state = _state(model, training)
    moments = moments_of(model, training)
    kept_there = [_offloaded(moment, model, training, placement) for moment in moments]
    most, waiting = max(kept_there, key=lambda pair: pair[0].total)
    items = [
        *residual_items(model, placement, device),
        *dense_items(model, placement, device),
        on(device, "frozen components", model.buffers),
        on(device, "trained parameters", total_bytes(model.parameters)),
        _optimizer_item(state, device),
        on(device, "gradients", most.gradients),
        _checkpoint_item(most.checkpoints, waiting, device),
        on(device, "activations of one block", most.block),
        on(device, "decode workspace", most.decoding),
        on(device, "loss", most.loss),
        on(device, "optimizer step", most.optimizer),
        context_item(device),
        Item("checkpoints of the run", disk=KEPT_RUNS * (total_bytes(model.parameters) + state.device)),
    ]
    return MemoryPlan("train", items_of(items, device), limits, _notes(model, training, device))


@lru_cache(maxsize=4096)
def moments_of(model: SplitModelPlan, training: Training) -> tuple[Moment, ...]:
    """The moments of a step that can be its worst."""
    batch, passes = training.batch, training.accumulate if training.layer_major else 1
    blocks = run_blocks(model, batch)
    tokens = ROWS_OF_TOKENS * batch.tokens * batch.batch
    below = [passes * (blocks[0].around + blocks[0].input + tokens)]
    for block in blocks:
        below.append(below[-1] + passes * block.kept)
    gradients = [total_bytes(block.parameters) for block in model.blocks]
    everything = sum(gradients)
    before = everything if training.accumulate > passes else 0
    joined = passes * blocks[0].input if passes > 1 else 0  # outputs of the parts, and the same as one
    found = [
        Moment("forward", below[-2] + joined, before, *_parts(blocks[-1].forward)),
        Moment("loss", below[-1], before, loss=_loss(model, training, passes * blocks[-1].input)),
        Moment("final norm", below[-1], before, block=_final_norm(model, passes * blocks[-1].input)),
        Moment("optimizer step", gradients=everything, optimizer=_state(model, training).workspace),
    ]
    for number, block in enumerate(blocks):
        peak = block.later if before else block.first  # the first has the block's own new gradients inside
        above = before or sum(gradients[number + (1 if passes == 1 else 0) :])
        found.append(Moment("backward", below[number] + SLICES * joined, above, *_parts(peak)))
    return tuple(found)


def _state(model: SplitModelPlan, training: Training) -> OptimizerBytes:
    return optimizer_bytes(training.optimizer, model.parameters, on_gpu=training.batch.device == "cuda")


def _parts(peak: Peak) -> tuple[int, int]:
    return peak.total - peak.decoding, peak.decoding


def _loss(model: SplitModelPlan, training: Training, hidden: int) -> int:
    """The last hidden state, of so many bytes, the final norm's input in float32, and the loss of a whole pass."""
    exact = _exact(model, hidden)
    kept = hidden + (exact if model.dtype.itemsize < 4 else 0)
    if not training.has_loss:
        return kept
    text, batch = model.text_config, training.batch
    rows = batch.batch * (training.accumulate if training.layer_major else 1)
    loss = loss_bytes(batch.tokens, rows, text.hidden_size, text.vocab_size, dtype=model.dtype, device=batch.device)
    return kept + loss.kept + loss.peak


def _final_norm(model: SplitModelPlan, hidden: int) -> int:
    """Its backward pass: the gradient, three hidden states in float32, and the input in float32 if it is another."""
    return hidden + (4 if model.dtype.itemsize < 4 else 3) * _exact(model, hidden)


def _exact(model: SplitModelPlan, hidden: int) -> int:
    """Of the same hidden state in float32."""
    return 4 * hidden // model.dtype.itemsize


def _offloaded(moment: Moment, model: SplitModelPlan, training: Training, placement: Placement) -> tuple[Moment, int]:
    """The moment with only the nearest checkpoints on the device, and the bytes of those that wait on the host."""
    if not placement.activation_offload:
        return moment, 0
    block = run_blocks(model, training.batch)[0]
    near = block.around + (AHEAD * block.input if training.batch.checkpointing else block.input + block.kept)
    staying = min(moment.checkpoints, near)
    return replace(moment, checkpoints=staying), moment.checkpoints - staying


def _checkpoint_item(here: int, waiting: int, device: str) -> Item:
    item = on(device, "checkpoints of activations", here)
    return replace(item, host=item.host + waiting)


def _optimizer_item(state: OptimizerBytes, device: str) -> Item:
    item = on(device, "optimizer state", state.device)
    return replace(item, host=item.host + state.host)


def _notes(model: SplitModelPlan, training: Training, device: str) -> tuple[str, ...]:
    notes = ["Everything is counted from shapes, at the worst moment of a step; GB are 10^9 bytes."]
    notes += context_notes(device)
    if training.optimizer.startswith("paged"):
        notes.append("The state of a paged optimizer counts on the GPU, and can leave it when the card is full.")
    if training.batch.is_masked:
        notes.append("Sequences are padded or packed, so attention holds a mask of tokens x tokens for each.")
    if not model.skeleton.has_fused_attention:
        notes.append("transformers runs this model with eager attention, whose tokens x tokens matrices are counted.")
    if model.dense.experts:
        notes.append("Experts are 3-D stacks, which qsvd does not split: they are counted in 16 bits and frozen.")
    return tuple(notes)
