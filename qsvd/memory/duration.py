"""Estimates of how long training and quantizing take, from the speed of a machine."""

import math
from dataclasses import dataclass
from typing import Literal

from qsvd.decompose.alternate import FIRST_PASSES, LATER_PASSES
from qsvd.memory.frozen import base_bytes, resident_of
from qsvd.memory.items import SIXTEEN_BITS, Placement
from qsvd.memory.split_model import SplitModelPlan
from qsvd.memory.training import Training, num_kept
from qsvd.numerics.norms import PROBES
from qsvd.numerics.svd import OVERSAMPLE, OVERSAMPLE_SHARE

EXACT_SHARE = 0.25  # speed of float32 products, relative to 16 bits (assumed)
LANCZOS_STEPS = 16  # steps of one estimate of a norm: what noise needs
TRAFFIC = 60  # bytes read and written for a number in an iteration: copied in float32, encoded, decoded, subtracted
DECODED = 2.6  # bytes read and written to decode a number of a residual: 4 bits and scales in, 16 bits out
BYTES_PER_OPERATION = 0.01  # memory bandwidth over speed: 1 TB/s and 100 TFLOP/s, as on a 4090


@dataclass(frozen=True)
class Rate:
    """A number per second, and where it comes from."""

    value: float
    source: Literal["assumed", "given", "measured"] = "assumed"


@dataclass(frozen=True)
class Speed:
    """Speed of a machine.

    Args:
        flops: Products and sums in 16 bits.
        link: Bytes from CPU memory to the GPU.
        disk: Bytes from or to the disk.
    """

    flops: Rate
    link: Rate
    disk: Rate


GPU = Speed(Rate(1e14), Rate(25e9), Rate(3e9))  # assumed: a PCIe 4 GPU and an NVMe disk


@dataclass(frozen=True)
class StepTime:
    """Estimated seconds of one training step: products and decoding, or copying pages, which overlaps with them."""

    compute: float
    decode: float
    transfer: float
    tokens: int

    @property
    def is_hidden(self) -> bool:
        """Whether copying takes no time of its own."""
        return self.transfer <= self.compute + self.decode

    @property
    def seconds(self) -> float:
        return max(self.compute + self.decode, self.transfer)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def step_time(model: SplitModelPlan, training: Training, placement: Placement, speed: Speed) -> StepTime:
    """Estimate one training step: 6 operations per number of the model and token, 4 where activations are kept.

    Frozen weights have no gradients: a step is a forward pass, its recomputation, and the gradients of inputs. Each of
    these decodes the residuals, for every batch. Every page is copied twice for each batch, or twice for the step with
    layer-major accumulation.
    """
    tokens = training.batch.tokens * training.batch.batch * training.accumulate
    text = model.text_config
    numbers = model.elements + text.hidden_size * getattr(text, "vocab_size", 0)
    numbers += sum(adapter.numbers for adapter in model.adapters.values())
    passes = 3 - num_kept(training, placement, len(model.blocks)) / len(model.blocks)
    decode = training.accumulate * passes * DECODED * model.elements / (BYTES_PER_OPERATION * speed.flops.value)
    copies = 2 * (1 if training.layer_major else training.accumulate)
    transfer = copies * page_seconds(model, placement, speed)
    return StepTime(2 * passes * numbers * tokens / speed.flops.value, decode, transfer, tokens)


def page_seconds(model: SplitModelPlan, placement: Placement, speed: Speed) -> float:
    """Estimate the seconds for copying every page once, or the part of it that one of several processes keeps."""
    resident = resident_of(model, placement)
    paged = sum(block.page for number, block in enumerate(model.blocks) if number not in resident)
    paged /= max(placement.shards, 1)
    return paged / (speed.link.value if placement.pages == "host" else min(speed.link.value, speed.disk.value))


@dataclass(frozen=True)
class QuantizeTime:
    """Estimated seconds of `qsvd quantize`: reading and computing overlap, writing comes on top."""

    compute: float
    read: float
    write: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.read) + self.write


def quantize_time(model: SplitModelPlan, iterations: int, speed: Speed) -> QuantizeTime:
    """Estimate `qsvd quantize`: products with sketches and with the probes of norms, memory traffic, and files.

    The output is written twice: weight by weight, and joined to shards.
    """
    in_tables = sum(math.prod(table.shape) for table in model.tables)
    traffic = TRAFFIC * (iterations * model.elements + in_tables) / (BYTES_PER_OPERATION * speed.flops.value)
    products = _operations(model, iterations) / (EXACT_SHARE * speed.flops.value)
    packed = sum(table.codec.num_bytes(table.shape) for table in model.tables)
    source = SIXTEEN_BITS * (model.elements + in_tables) + model.dense.total - packed
    return QuantizeTime(products + traffic, source / speed.disk.value, 2 * base_bytes(model) / speed.disk.value)


def _operations(model: SplitModelPlan, iterations: int) -> float:
    operations = 0.0
    for spec, choice in model.all_choices.items():
        rank = choice.rank
        columns = rank + max(OVERSAMPLE, rank // OVERSAMPLE_SHARE) if rank else 0
        passes = 2 * (FIRST_PASSES + iterations * LATER_PASSES)
        norms = 2 * 2 * LANCZOS_STEPS * PROBES
        operations += 2 * math.prod(spec.shape) * (passes * columns + 2 * iterations * rank + norms)
    return operations
