"""An allocation without a look at the weights: what a budget will look like, for a plan from a config alone.

Every weight is taken for Gaussian noise, in which all numbers matter alike; bytes come out as of a real allocation, and
which weight gets which codec does not.
"""

import math
from collections.abc import Sequence
from functools import cache

import torch

from qsvd.errors import BadInput
from qsvd.numerics.names import codec_named
from qsvd.plan.allocation import Allocation, Choice, residual_bytes
from qsvd.plan.budget import parse_budget
from qsvd.plan.grid import CODECS
from qsvd.plan.program import Candidates, solve_program
from qsvd.plan.weights import WeightSpec

SAMPLE = (256, 256)
FACTOR_BYTES = 2  # of a stored number of the factors
SECONDS = 5.0  # for the solver; among weights that are alike nothing is gained by more


def assumed(weights: Sequence[WeightSpec], budget: str, rank: int) -> Allocation:
    """Codecs for these weights, each with `rank` components in 16 bits, cut to its shorter side.

    Args:
        budget: "2.75bits" or "20GB", for residuals and factors.

    Raises:
        BadInput: it is no budget, or one that `most_rank_within` finds too small.
    """
    wanted = parse_budget(budget, weights)
    choices = [[Choice(codec_named(name), min(rank, *spec.shape)) for name in CODECS] for spec in weights]
    options = [
        Candidates(
            [choice.num_bytes(spec.shape, FACTOR_BYTES) for choice in tried],
            [math.prod(spec.shape) * noise_square(name) for name in CODECS],
        )
        for spec, tried in zip(weights, choices, strict=True)
    ]
    picked = solve_program(options, wanted.num_bytes, time_limit=SECONDS).picked
    pairs = zip(weights, choices, picked, strict=True)
    return Allocation({spec.module: tried[number] for spec, tried, number in pairs})


def most_rank_within(weights: Sequence[WeightSpec], budget: str) -> int:
    """The highest rank, the same for all weights, that the budget holds beside the smallest codec.

    Raises:
        BadInput: it is no budget, or not even rank 0 fits.
    """
    wanted = parse_budget(budget, weights)
    smallest = [min(residual_bytes(codec_named(name), spec.shape) for name in CODECS) for spec in weights]
    left = wanted.num_bytes - sum(smallest)
    if left < 0:
        raise BadInput(
            f"--budget {budget} is too small: the {len(weights)} weights need {wanted.enough(sum(smallest))}"
        )
    shortest = min(min(spec.shape) for spec in weights)
    return min(left // sum(FACTOR_BYTES * sum(spec.shape) for spec in weights), shortest)


@cache
def noise_square(codec: str) -> float:
    """Squared error that a codec leaves of Gaussian noise, over that of the noise itself."""
    noise = torch.randn(SAMPLE, generator=torch.Generator().manual_seed(0))
    left = codec_named(codec).encode(noise).decode() - noise
    return float(left.square().sum() / noise.square().sum())
