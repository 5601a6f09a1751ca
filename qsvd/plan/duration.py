"""How long things take, from a speed and a bandwidth: estimates, for choosing, never measurements."""

import math
from dataclasses import dataclass

from qsvd.numerics.error import PROBES
from qsvd.numerics.svd import OVERSAMPLE, OVERSAMPLE_SHARE
from qsvd.plan.frozen import staying_blocks
from qsvd.plan.pages import Placement
from qsvd.plan.split_model import SplitModelPlan
from qsvd.plan.training import Training

EXACT_SHARE = 0.25  # of the speed in 16 bits that float32 products are taken to reach
LANCZOS_STEPS = 16  # of a norm's estimate, before and after: what noise needs
FIRST_PASSES, LATER_PASSES = 5, 1  # of the randomized SVD (decompose/alternate.py)


@dataclass(frozen=True)
class Speed:
    """What a machine does.

    Args:
        flops: Products and sums a second, in 16 bits.
        link: Bytes a second from where pages lie to the device.
        is_assumed: Whether nobody gave these numbers.
    """

    flops: float
    link: float
    is_assumed: bool


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
    staying = staying_blocks(model, placement)
    paged = sum(block.page for number, block in enumerate(model.blocks) if number not in staying)
    visits = 2 * (1 if training.layer_major else training.accumulate)
    return StepTime(each * numbers * tokens / speed.flops, visits * paged / speed.link, tokens)


def quantize_seconds(model: SplitModelPlan, iterations: int, speed: Speed) -> float:
    """Of a whole `qsvd quantize`, an estimate: products with sketches and with the probes of the error's norms."""
    operations = 0.0
    for spec in model.names.weights:
        rank = model.ranks[spec.name]
        columns = rank + max(OVERSAMPLE, rank // OVERSAMPLE_SHARE) if rank else 0
        passes = 2 * (FIRST_PASSES + iterations * LATER_PASSES)
        norms = 2 * 2 * LANCZOS_STEPS * PROBES
        operations += 2 * math.prod(spec.shape) * (passes * columns + 2 * iterations * rank + norms)
    return operations / (EXACT_SHARE * speed.flops)
