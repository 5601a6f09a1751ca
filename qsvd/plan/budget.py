"""The budget of an allocation, "2.75bits" per number of the weights or "20GB" for all of them, and an allocation from
shapes alone that meets it.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

import torch

from qsvd.errors import BINARY, UNITS, BadInput, parse_size
from qsvd.numerics.names import codec_named
from qsvd.plan.allocation import Allocation, Choice, residual_bytes
from qsvd.plan.grid import CODECS
from qsvd.plan.program import Candidates, solve_program
from qsvd.plan.weights import WeightSpec

MOST_BITS = 16  # of the weights that are not quantized
BITS = re.compile(r"(\d+(?:\.\d+)?)\s*bits?", re.IGNORECASE)
UNIT = re.compile(r"([KMGT]I?)B?$")
SAMPLE = (256, 256)
FACTOR_BYTES = 2  # of a stored number of the factors
SECONDS = 5.0  # for the solver; more gains nothing among equal weights


@dataclass(frozen=True)
class Budget:
    """Bytes for all weights to split.

    Args:
        text: As it was written.
        num_bytes: In total.
        num_elements: Numbers of all weights.
        unit: "bits", or a unit of bytes: "GB" or "GIB".
    """

    text: str
    num_bytes: int
    num_elements: int
    unit: str

    @property
    def most_bytes(self) -> int:
        """Bytes of the weights in 16 bits, above which a budget is refused."""
        return MOST_BITS * self.num_elements // 8

    def enough(self, num_bytes: int) -> str:
        """Return the least budget that holds `num_bytes`, in the same unit, with three decimals."""
        if self.unit == "bits":
            exact = Fraction(8 * num_bytes, self.num_elements)
        else:
            exact = Fraction(num_bytes, (UNITS | BINARY)[self.unit])
        return f"{math.ceil(exact * 1000) / 1000:.3f}{self.unit.replace('I', 'i')}"


def parse_budget(text: str, weights: Sequence[WeightSpec]) -> Budget:
    """Read the budget of these weights.

    Raises:
        BadInput: the text is neither bits nor bytes, or more than the weights take in 16 bits.
    """
    num_elements = sum(math.prod(spec.shape) for spec in weights)
    stripped = text.strip()
    found, unit = BITS.fullmatch(stripped), UNIT.search(stripped.upper())
    if found:
        num_bytes, name = int(Fraction(found[1]) * num_elements / 8), "bits"
    elif unit:
        num_bytes, name = parse_size(stripped, "--budget"), f"{unit[1]}B"
    else:
        raise BadInput(
            f"--budget {text!r} is not a budget: give bits per number of the weights, such as 2.75bits, or bytes for "
            "all weights in KB, MB, GB, TB, KiB, MiB, GiB or TiB, such as 20GB"
        )
    budget = Budget(text, num_bytes, num_elements, name)
    if num_bytes > budget.most_bytes:
        raise BadInput(
            f"--budget {text} is above {MOST_BITS} bits a number ({budget.enough(budget.most_bytes)}), the size of "
            "the weights before quantization; give a smaller budget"
        )
    return budget


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
