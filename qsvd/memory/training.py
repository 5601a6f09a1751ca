"""Bytes of a training run, by item, at the moment of a step that takes most."""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from qsvd.memory.block_bytes import Backward, Batch, BlockBytes, BlockPeak, run_blocks
from qsvd.memory.encoder import EXACT, encoder_bytes
from qsvd.memory.frozen import context_notes, dense_items, library_items, residual_items
from qsvd.memory.items import Item, Limits, MemoryPlan, Placement, all_of, items_of, on
from qsvd.memory.split_model import SplitModelPlan
from qsvd.plan.tensors import OptimizerBytes, optimizer_bytes, small_state, total_bytes

# Bytes of the loss: TRL's chunked log-probabilities, never all logits (kernels/chunked_logprob.py of 1.16).

ROWS = {"cuda": 4096, "cpu": 256}  # of the tile of logits; on a CPU, where a tile takes most, fewer than TRL's 4096
COLUMNS = 32768  # of the tile, which is made whole even for a smaller vocabulary
VECTORS = 10  # float32 numbers kept for each token: maxima, sums, labels
TILE_WORK = 29  # bytes per element that torch's operations on a tile take on a CPU; a GPU has one kernel, in place


def is_copied(device: str, batch: int) -> bool:
    """Return whether the loss takes a copy of the hidden states that it scores, not a view."""
    return device == "cuda" or batch > 1


def loss_bytes(
    tokens: int, batch: int, hidden: int, vocabulary: int, *, dtype: torch.dtype, device: str
) -> tuple[int, int]:
    """Return the bytes kept from the forward pass of the loss on, and the most that its backward pass adds.

    Every token but the first of each sequence is scored. A CPU uses torch's operations in place of one kernel.
    """
    scored, columns = (tokens - 1) * batch, min(vocabulary, COLUMNS)
    rows = min(scored, ROWS[device])
    copied = is_copied(device, batch)
    states = scored * hidden
    is_short = dtype != torch.float32
    work = 0
    if device == "cpu":
        exact = 4 * (rows + hidden) * columns if is_short else 0  # float32 copies of the tile and of its weights
        work = max(TILE_WORK * rows * columns, exact)
    rounded = dtype.itemsize * states if is_short else 0  # the rounded gradient, made before the tile is freed
    kept = 4 * VECTORS * scored + (dtype.itemsize * states if copied else 0)
    return kept, 4 * states + rows * COLUMNS * dtype.itemsize + max(work, rounded)


def whole_loss_bytes(tokens: int, vocabulary: int, *, dtype: torch.dtype) -> int:
    """Return the bytes of transformers' own loss, which an encoder-decoder has: of all logits at once.

    In its backward pass these are the log-probabilities, their gradient and that of the logits, in the dtype of both.
    """
    return 3 * tokens * vocabulary * dtype.itemsize


TOKEN = 24  # bytes: its number, its label and its mask, 64 bits each
KEPT_RUNS = 3  # checkpoints of a run on disk: two that are kept and one that is being written
SLICES = 3  # layer-major: gradients of the block's output, of its input, and of the parts of the input
AHEAD = 6  # checkpoints on the GPU at most while the others are in CPU memory (TRL's max_fwd_stash_size is 5)


@dataclass(frozen=True)
class Training:
    """How to train.

    Args:
        batch: One batch.
        accumulate: Batches in a step.
        optimizer: Its name in qsvd.
        layer_major: Whether a block computes all batches of a step before the next block begins.
        has_loss: Whether a language model is trained; a classifier has no output head, and a small loss.
        pixels: Numbers that a processor makes of the images of a batch.
    """

    batch: Batch
    accumulate: int
    optimizer: str
    layer_major: bool = False
    has_loss: bool = True
    pixels: int = 0


@dataclass(frozen=True)
class Moment:
    """Temporary bytes at one moment of a step."""

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
    """Return the bytes at the moment of a step that takes most on the device.

    Raises:
        BadInput: the model cannot be run from tokens alone, or the optimizer is unknown.
    """
    device = training.batch.device
    state = _state(model, training)
    moments = [
        _offloaded(moment, model, training, placement) for moment in moments_of(model, training, placement.unrecomputed)
    ]
    most, offloaded = max(moments, key=lambda pair: pair[0].total)
    items = [
        *residual_items(model, placement, device),
        *dense_items(model, placement, device, has_head=training.has_loss),
        on(device, "frozen components", model.buffers),
        on(device, "trained parameters", total_bytes(model.parameters)),
        _with_host(on(device, "optimizer state", state.device + model.hook_state), state.host),
        on(device, "gradients", most.gradients),
        _with_host(on(device, "checkpoints of activations", most.checkpoints), offloaded),
        on(device, "activations of one block", most.block),
        on(device, "decode workspace", most.decoding),
        on(device, "loss", most.loss),
        on(device, "optimizer step", most.optimizer),
        *library_items(device),
        Item(
            "checkpoints of the run", disk=KEPT_RUNS * (total_bytes(model.parameters) + state.device + model.hook_state)
        ),
    ]
    return MemoryPlan("train", items_of(items, device), limits, _notes(model, training, device))


@lru_cache(maxsize=4096)
def moments_of(model: SplitModelPlan, training: Training, unrecomputed: int = 0) -> tuple[Moment, ...]:
    """Return the moments of a step that can take most.

    Args:
        unrecomputed: Number of blocks that keep their activations, the last ones. The backward pass begins with them,
            and frees them before it recomputes the others.
    """
    batch, passes = training.batch, training.accumulate if training.layer_major else 1
    blocks = _blocks(model, training)
    if unrecomputed and batch.checkpointing:
        kept = _blocks(model, replace(training, batch=replace(batch, checkpointing=False)))
        blocks = (*blocks[:-unrecomputed], *kept[-unrecomputed:])
    tokens = TOKEN * batch.tokens * batch.batch + EXACT * training.pixels
    below = [passes * (_around(model, blocks) + blocks[0].input + tokens)]
    for block in blocks:
        below.append(below[-1] + passes * block.kept)
    gradients = [total_bytes(block.parameters) for block in model.language_blocks]
    everything = sum(gradients)
    before = everything if training.accumulate > passes else 0
    joined = passes * blocks[0].input if passes > 1 else 0  # the parts' outputs as one tensor, besides the parts
    found = [
        Moment("forward", below[-2] + joined, before, *_parts(blocks[-1].forward)),
        Moment(
            "loss",
            below[-1],
            before,
            decoding=model.decoded_head if training.has_loss else 0,
            loss=_loss(model, training, passes * blocks[-1].input),
        ),
        Moment("final norm", below[-1], before, block=_final_norm(model, passes * blocks[-1].input)),
        Moment("encoder", EXACT * training.pixels, before, block=encoder_bytes(model, training.pixels, batch.device)),
        Moment("optimizer step", gradients=everything, optimizer=_state(model, training).workspace),
    ]
    for number, block in enumerate(blocks):
        above = before or sum(gradients[number + (1 if passes == 1 else 0) :])  # a block's peak has its own new ones
        found.append(Moment("backward", below[number] + SLICES * joined, above, *_parts(block.backward)))
    return tuple(found)


def _blocks(model: SplitModelPlan, training: Training) -> tuple[BlockBytes, ...]:
    """Return the bytes of the blocks, in the backward pass that takes most: a later one has all gradients before it."""
    passes = training.accumulate if training.layer_major else 1
    backward: Backward = "later" if training.accumulate > passes else "first"
    return run_blocks(model, training.batch, backward)


def _around(model: SplitModelPlan, blocks: tuple[BlockBytes, ...]) -> int:
    """Return the bytes that blocks share. Encoder and decoder have masks each; T5 has biases from its first blocks."""
    if not model.skeleton.model.config.is_encoder_decoder:
        return blocks[0].around
    pairs = [*zip(model.language_blocks, blocks, strict=True)]
    encoder = [found.around for block, found in pairs if "decoder" not in block.path.split(".")]
    return max(encoder, default=0) + max(found.around for found in blocks)


def num_kept(training: Training, placement: Placement, blocks: int) -> int:
    """Return how many of the blocks keep their activations: all without checkpointing."""
    return placement.unrecomputed if training.batch.checkpointing else blocks


def show_activations(training: Training, placement: Placement, blocks: int) -> str:
    """Return in words which blocks keep their activations."""
    kept = num_kept(training, placement, blocks)
    if kept in (0, blocks):
        return f"activations of {all_of(blocks)} are {'kept' if kept else 'recomputed'}"
    return f"activations of {kept} of {blocks} blocks are kept, {blocks - kept} are recomputed"


def _state(model: SplitModelPlan, training: Training) -> OptimizerBytes:
    return optimizer_bytes(training.optimizer, model.parameters, on_gpu=training.batch.device == "cuda")


def _parts(peak: BlockPeak) -> tuple[int, int]:
    return peak.total - peak.decoding, peak.decoding


def _loss(model: SplitModelPlan, training: Training, hidden: int) -> int:
    """Return the bytes of the final norm's output, of its float32 copy of the last block's output, and of the loss.

    With a loss, the output goes where the loss has a copy of it, and the last block's output where the norm has one.
    """
    is_short = model.dtype.itemsize < 4
    exact = _exact(model, hidden) if is_short else 0
    if not training.has_loss or getattr(model.text_config, "vocab_size", None) is None:
        return hidden + exact
    text, batch = model.text_config, training.batch
    rows = batch.batch * (training.accumulate if training.layer_major else 1)
    if model.skeleton.model.config.is_encoder_decoder:
        return hidden + exact + whole_loss_bytes(batch.tokens * rows, text.vocab_size, dtype=model.dtype)
    kept = (0 if is_copied(batch.device, rows) else hidden) + exact - (hidden if is_short else 0)
    loss = loss_bytes(batch.tokens, rows, text.hidden_size, text.vocab_size, dtype=model.dtype, device=batch.device)
    return kept + sum(loss)


def _final_norm(model: SplitModelPlan, hidden: int) -> int:
    """Return the bytes of its backward pass: the gradient, three float32 hidden states, one more if not in float32."""
    return hidden + (4 if model.dtype.itemsize < 4 else 3) * _exact(model, hidden)


def _exact(model: SplitModelPlan, hidden: int) -> int:
    """Return the bytes of this hidden state in float32."""
    return 4 * hidden // model.dtype.itemsize


def _offloaded(moment: Moment, model: SplitModelPlan, training: Training, placement: Placement) -> tuple[Moment, int]:
    """Return the moment with only the nearest checkpoints on the device, and the bytes that are in CPU memory."""
    if not placement.activation_offload:
        return moment, 0
    block = _blocks(model, training)[0]
    near = block.around + (AHEAD * block.input if training.batch.checkpointing else block.input + block.kept)
    kept = min(moment.checkpoints, near)
    return replace(moment, checkpoints=kept), moment.checkpoints - kept


def _with_host(item: Item, num_bytes: int) -> Item:
    return replace(item, host=item.host + num_bytes)


def _notes(model: SplitModelPlan, training: Training, device: str) -> tuple[str, ...]:
    notes = ["Bytes are counted from shapes, at the moment of a step that takes most; GB are 10^9 bytes."]
    notes += context_notes(device)
    small = small_state(training.optimizer, model.parameters, on_gpu=device == "cuda")
    if small is not None:
        notes.append(small)
    elif training.optimizer.startswith("paged"):
        notes.append("The state of a paged optimizer is counted on the GPU; it can leave the GPU when that is full.")
    if training.pixels:
        notes.append("The encoder of images is counted as if a block of it freed nothing that it made.")
    if training.batch.is_masked:
        notes.append("Sequences are padded or packed, so attention holds a tokens x tokens mask for each.")
    if not model.skeleton.has_fused_attention:
        notes.append("transformers runs this model with eager attention, whose tokens x tokens matrices are counted.")
    if model.dense.experts:
        notes.append("Experts that are not quantized are counted in 16 bits and frozen.")
    return tuple(notes)
