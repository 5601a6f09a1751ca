"""An allocation for a budget from shapes alone, for a plan from config.json.

Every weight is assumed to be Gaussian noise in which all numbers matter equally. The total bytes are those of a real
allocation; the codec of a single weight is not.
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
SECONDS = 5.0  # for the solver; more gains nothing among equal weights


def assumed(weights: Sequence[WeightSpec], budget: str, rank: int) -> Allocation:
    """Return codecs for these weights, each with `rank` components in 16 bits, cut to its shorter side.

    Args:
        budget: "2.75bits" or "20GB", for residuals and components.

    Raises:
        BadInput: budget is not a budget, or is too small.
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
    """Return the highest rank, the same for all weights, that fits the budget with the smallest codec.

    Raises:
        BadInput: budget is not a budget, or rank 0 does not fit.
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
    """Return the squared error of a codec on Gaussian noise, over the squared norm of the noise."""
    noise = torch.randn(SAMPLE, generator=torch.Generator().manual_seed(0))
    left = codec_named(codec).encode(noise).decode() - noise
    return float(left.square().sum() / noise.square().sum())
