"""Bytes of the encoder of images in a step: it is frozen and runs forward only, before the language model."""

import math
from functools import lru_cache

import torch
from torch import nn

from qsvd.memory.items import block_of
from qsvd.memory.split_model import SplitModelPlan
from qsvd.memory.twins import Decoding, LiveBytes
from qsvd.plan.language import is_in, towers

LAYERS = (nn.Linear, nn.Conv2d, nn.Conv3d)
EXACT = 4  # bytes of a number that the processor makes, which the batch holds for the whole step
STATES = 4  # hidden states of a block beside the outputs of its layers: its input, its norms, the sum


@lru_cache(maxsize=256)
def encoder_bytes(model: SplitModelPlan, pixels: int, device: str) -> int:
    """Return the most bytes that the encoder takes for the images of a batch, as if a block freed nothing that it made.

    The positions follow from the first layer of the encoder, which takes the numbers of a patch. Layers that join
    patches later are counted as if they took all of them.

    Args:
        pixels: Numbers that the processor makes of the images of a batch.
        device: "cuda" or "cpu".
    """
    outside = towers(model.skeleton.model)
    layers = {path: module for path, module in model.skeleton.model.named_modules() if is_in(path, outside)}
    weights = {path: module.weight for path, module in layers.items() if isinstance(module, LAYERS)}
    if not weights or not pixels:
        return 0
    patch = next(iter(weights.values()))
    positions = math.ceil(pixels / math.prod(patch.shape[1:]))
    outputs: dict[str, list[int]] = {}
    for path, weight in weights.items():
        outputs.setdefault(block_of(path), []).append(weight.shape[0])
    numbers = max(sum(widths) + STATES * min(widths) for widths in outputs.values())
    return model.dtype.itemsize * (pixels + positions * numbers) + _decoding(model, device)


def _decoding(model: SplitModelPlan, device: str) -> int:
    """Return the most bytes that decoding a quantized layer of the encoder takes in its forward pass."""
    live, nothing = LiveBytes(), torch.empty(0, dtype=model.dtype, device="meta")
    choices = model.allocation.choices
    for shape, codec in {(spec.shape, choices[spec.module].codec) for spec in model.names.weights if spec.is_tower}:
        with live:
            Decoding(shape, codec, device, live).bands(nothing, at_once=1)
    return live.peak
