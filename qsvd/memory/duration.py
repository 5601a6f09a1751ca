"""How long things take, from a speed and a bandwidth: estimates, for choosing, never measurements."""

import math
from dataclasses import dataclass
from typing import Literal

from qsvd.decompose.alternate import FIRST_PASSES, LATER_PASSES
from qsvd.memory.frozen import base_bytes, staying_blocks
from qsvd.memory.items import Placement
from qsvd.memory.split_model import SplitModelPlan
from qsvd.memory.training import Training
from qsvd.numerics.norms import PROBES
from qsvd.numerics.svd import OVERSAMPLE, OVERSAMPLE_SHARE

EXACT_SHARE = 0.25  # of the speed in 16 bits that float32 products are taken to reach
LANCZOS_STEPS = 16  # of a norm's estimate, before and after: what noise needs
TRAFFIC = 60  # bytes of memory for a number in an iteration: copied in float32, encoded, decoded, subtracted
BYTES_PER_OPERATION = 0.01  # of memory, while it computes at full speed: 1 TB/s beside 100 TFLOP/s, as on a 4090
SOURCE = 2  # bytes of a number of the 16-bit checkpoint


@dataclass(frozen=True)
class Rate:
    """So much a second, and how that is known."""

    value: float
    source: Literal["assumed", "given", "measured"] = "assumed"


@dataclass(frozen=True)
class Speed:
    """What a machine does in a second.

    Args:
        flops: Products and sums, in 16 bits.
        link: Bytes from host memory to the device.
        disk: Bytes from the disk, or to it.
    """

    flops: Rate
    link: Rate
    disk: Rate


@dataclass(frozen=True)
class StepTime:
    """Seconds of one training step, an estimate: the longer of computing and moving, which overlap."""

    compute: float
    transfer: float
    tokens: int

    @property
    def seconds(self) -> float:
        return max(self.compute, self.transfer)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def step_time(model: SplitModelPlan, training: Training, placement: Placement, speed: Speed) -> StepTime:
    """Of one step: 6 operations for a number of the model and a token, 4 without checkpointing.

    The base is frozen, so its gradients cost nothing: forward, again forward, and the gradient of the input. Every page
    comes twice for each batch, or twice for the step where blocks take all batches one after the other.
    """
    tokens = training.batch.tokens * training.batch.batch * training.accumulate
    text = model.text_config
    numbers = model.elements + text.hidden_size * text.vocab_size
    each = 6 if training.batch.checkpointing else 4
    visits = 2 * (1 if training.layer_major else training.accumulate)
    transfer = visits * page_seconds(model, placement, speed)
    return StepTime(each * numbers * tokens / speed.flops.value, transfer, tokens)


def page_seconds(model: SplitModelPlan, placement: Placement, speed: Speed) -> float:
    """Of all pages, moved once."""
    staying = staying_blocks(model, placement)
    paged = sum(block.page for number, block in enumerate(model.blocks) if number not in staying)
    return paged / (speed.link.value if placement.pages == "host" else min(speed.link.value, speed.disk.value))


@dataclass(frozen=True)
class QuantizeTime:
    """Seconds of a whole `qsvd quantize`, an estimate: reading hides behind computing or the other way round."""

    compute: float
    read: float
    write: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.read) + self.write


def quantize_time(model: SplitModelPlan, iterations: int, speed: Speed) -> QuantizeTime:
    """Products with sketches and with the probes of the error's norms, the memory that is gone through, and the files.

    The result is written twice: weight by weight, and joined to shards.
    """
    traffic = TRAFFIC * iterations * model.elements / (BYTES_PER_OPERATION * speed.flops.value)
    products = _operations(model, iterations) / (EXACT_SHARE * speed.flops.value)
    source = SOURCE * model.elements + model.dense.total
    return QuantizeTime(products + traffic, source / speed.disk.value, 2 * base_bytes(model) / speed.disk.value)


def _operations(model: SplitModelPlan, iterations: int) -> float:
    operations = 0.0
    for spec in model.names.weights:
        rank = model.allocation.choices[spec.module].rank
        columns = rank + max(OVERSAMPLE, rank // OVERSAMPLE_SHARE) if rank else 0
        passes = 2 * (FIRST_PASSES + iterations * LATER_PASSES)
        norms = 2 * 2 * LANCZOS_STEPS * PROBES
        operations += 2 * math.prod(spec.shape) * (passes * columns + 2 * iterations * rank + norms)
    return operations
