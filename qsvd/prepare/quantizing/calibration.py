"""The texts that `qsvd quantize` and `allocate --calibrate` weight errors by, and the walk over the blocks on them."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from shutil import disk_usage

import torch

from qsvd import ranks
from qsvd.calibrate.block_walk import BlockWalk, GradientWalk, InputWalk
from qsvd.calibrate.streamed import StreamedModel
from qsvd.calibrate.sums import Example
from qsvd.data.examples import checked_length
from qsvd.errors import BadInput, DoesNotFit
from qsvd.files.quantized.stack import TensorStack
from qsvd.files.source import Checkpoint
from qsvd.memory.device import dtype_of, free_host_memory
from qsvd.memory.items import block_of
from qsvd.options import Allocate, Calibrate, Quantize
from qsvd.plan.weights import ModelPlan, context_length, is_classifier, writers
from qsvd.prepare.calibrate import draw_examples

SHARED_INPUT = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate up", "up": "gate up"}  # roles with one moment
HOST_SHARE = 0.5  # of the free CPU memory, for the hidden states of the texts at one block
DISK_SHARE = 0.5  # of the free space, for those at all blocks


def texts_of(options: Quantize | Allocate, checkpoint: Checkpoint, plan: ModelPlan) -> tuple[tuple[Example, ...], str]:
    """Return the texts of --calibrate, none without it, and a sentence on those that were cut.

    Raises:
        BadInput: the data cannot be read, the model has no loss to take gradients of, or it is an encoder-decoder.
    """
    if options.calibrate is None:
        return (), ""
    if checkpoint.config.is_encoder_decoder:
        raise BadInput(
            f"{options.model} is an encoder-decoder model, which --calibrate does not measure; leave it out, and give "
            "--quality good for error feedback without data"
        )
    if options.sensitivity == "both" and not (is_classifier(plan.architecture) or plan.architecture in writers()):
        raise BadInput(
            f"{options.model} is a {plan.architecture}, which has no loss to take gradients of: give --sensitivity "
            "inputs"
        )
    length = checked_length(options.max_length, context_length(checkpoint.config), options.model)
    asked = Calibrate(
        options.model,
        options.calibrate,
        Path(),
        examples=options.examples,
        max_length=length,
        loss_on="all",
        map=options.map,
        split=options.split,
        seed=options.seed,
    )
    return draw_examples(asked, checkpoint, plan, has_loss=False)


def streamed(checkpoint: Checkpoint, plan: ModelPlan, device: torch.device) -> StreamedModel:
    """Return the 16-bit model, of which one block is in memory."""
    return StreamedModel(checkpoint, plan, device, dtype_of("auto", device), twice=False)


def open_walk(
    options: Quantize | Allocate,
    examples: tuple[Example, ...],
    model: StreamedModel,
    show: Callable[[str], None],
    *,
    folder: Path,
) -> BlockWalk:
    """Return the walk over the blocks; texts run through the model as far as it needs that now.

    Args:
        folder: Where the inputs of blocks wait until gradients reach them; it exists.

    Raises:
        DoesNotFit: the hidden states of the texts need more than the CPU memory, or those of the blocks than the disk.
    """
    tokens = sum(len(example.input_ids) for example in examples)
    states = tokens * model.checkpoint.config.get_text_config().hidden_size * model.dtype.itemsize
    free = int(HOST_SHARE * free_host_memory())
    if states > free:
        raise DoesNotFit(
            f"the hidden states of {len(examples)} texts of {tokens} tokens need {states / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are half of the free CPU memory; give fewer --examples or a smaller --max-length"
        )
    if options.sensitivity == "inputs":
        return InputWalk(model, examples, show)
    kept = TensorStack(folder, int(DISK_SHARE * disk_usage(folder).free) // ranks.local_size())
    return GradientWalk(model, examples, show, seed=options.seed, inputs=kept)


def block_bytes(options: Quantize, plan: ModelPlan, device: torch.device) -> int:
    """Return the bytes on the device of the largest block and of the second moments of its layers; 0 without texts."""
    if options.calibrate is None:
        return 0
    weights, moments = Counter[str](), dict[str, dict[str, int]]()
    for spec in plan.weights:
        block, (rows, columns) = block_of(spec.module), spec.shape
        weights[block] += rows * columns * dtype_of("auto", device).itemsize
        sides = moments.setdefault(block, {})
        sides[SHARED_INPUT.get(spec.role, spec.module)] = 4 * columns**2
        if options.sensitivity == "both":
            sides[f"{spec.module} outputs"] = 4 * rows**2
    return max(weights[block] + sum(sides.values()) for block, sides in moments.items())
