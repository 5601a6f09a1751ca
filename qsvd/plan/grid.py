"""Which codecs and which ranks are tried on a weight, and what each pair of them takes of the budget.

Shape suffixes: O = out features, I = in features; a weight [O, I] has factors [O, R] and [R, I].
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from qsvd.errors import BadInput, listing
from qsvd.numerics.names import codec_named
from qsvd.numerics.nf4 import NormalFloat4
from qsvd.plan.allocation import Choice, residual_bytes
from qsvd.plan.tensors import TensorShape, optimizer_bytes, total_bytes
from qsvd.plan.weights import WeightSpec

# Of 176 of the family, mixtures of these leave the least error on weights of three models at any budget: fitted scales,
# nested to about as few bits as the codes. Of each number of bits there is a cheap and a good end.
CODECS = (
    *("nf2-128-3x64-fit", "nf2-32-3x64-fit", "nf3-64-4x64-fit", "nf3-16-4x64-fit"),
    *("nf4-64-4x64-fit", "nf4-16-4x64-fit", "nf8-128-8x256"),
)
MOST_RANKS = 8  # of the ladder, 0 among them
FACTOR_BITS = 4.0  # for each number of the weight: for as much the codes can have twice the bits, which gains more
TRAINED = torch.float32  # what `qsvd train` makes of the factors, unless they are too many
OPTIMIZER = "paged_adamw_8bit"  # its default on a GPU

Count = Literal["stored", "training"]


@dataclass(frozen=True)
class Grid:
    """What is tried.

    Args:
        codecs: By name.
        ranks: Offered to every weight; None is the ladder.
        rank: What allocator "bits" gives to every weight.

    A rank above the shorter side of a weight is cut to it.
    """

    codecs: tuple[str, ...]
    ranks: tuple[int, ...] | None
    rank: int

    def offered(self, shape: tuple[int, int]) -> tuple[int, ...]:
        """Ranks that an [O, I] weight may get, rising."""
        if self.ranks is None:
            return ladder(shape)
        return tuple(sorted({min(rank, min(shape)) for rank in self.ranks}))

    def fixed(self, shape: tuple[int, int]) -> int:
        """The rank of an [O, I] weight where bits alone vary."""
        return min(self.rank, min(shape))

    def measured(self, shape: tuple[int, int], *, with_fixed: bool) -> tuple[int, ...]:
        """Ranks that are measured, rising from 0; the fixed one is for allocator "bits" alone."""
        fixed = (self.fixed(shape),) if with_fixed else ()
        return tuple(sorted({0, *fixed, *self.offered(shape)}))

    def choices(self, ranks: Sequence[int]) -> list[Choice]:
        """Every codec at each of these ranks."""
        return [Choice(codec_named(name), rank) for rank in ranks for name in self.codecs]


def ladder(shape: tuple[int, int]) -> tuple[int, ...]:
    """0 and the highest powers of two whose factors, in 16 bits, take at most FACTOR_BITS a number of the weight."""
    most = FACTOR_BITS * math.prod(shape) / (16 * sum(shape))
    powers = [2**power for power in range(MOST_RANKS + 24) if 2**power <= most]
    return (0, *powers[1 - MOST_RANKS :])


def grid_of(codecs: Sequence[str], ranks: Sequence[int], rank: int, weights: Sequence[WeightSpec]) -> Grid:
    """What flags ask for; no codecs and no ranks are the defaults.

    Args:
        codecs, ranks: Values of --codecs and --ranks.
        rank: Value of --rank; above a weight's shorter side it is cut to it.

    Raises:
        BadInput: a codec is unknown or does not go with the others, a rank is negative, or above the shorter side of
            every weight.
    """
    names = tuple(dict.fromkeys(codecs)) or CODECS
    wrong = _wrong_codecs(names)
    limit = max(min(spec.shape) for spec in weights)
    outside = [str(one) for one in sorted({*ranks}) if not 0 <= one <= limit]
    if outside:
        wrong.append(f"--ranks {listing(outside)} are outside 0..{limit}, the ranks of the largest weights")
    if rank < 0:
        wrong.append(f"--rank {rank} is negative; 0 is no factors")
    if wrong:
        raise BadInput("; ".join(wrong))
    return Grid(names, tuple(sorted({*ranks})) or None, rank)


def _wrong_codecs(names: Sequence[str]) -> list[str]:
    wrong = []
    for name in names:
        try:
            codec_named(name)
        except ValueError as error:
            wrong.append(f"--codecs: {error}")
    if wrong:
        return wrong
    plain = [name for name in names if isinstance(codec_named(name), NormalFloat4)]
    if plain and len(names) > 1:
        return [
            f"--codecs {', '.join(plain)} is bitsandbytes' and stands for all weights or for none; give it alone, or "
            "nf4-64-8x256 beside others"
        ]
    return []


def counted_bytes(choice: Choice, shape: tuple[int, int], factor_bytes: int, count: Count) -> int:
    """What a choice takes of the budget.

    Args:
        factor_bytes: Of a stored number of the factors.
        count: "stored" counts the file: codes, scales, factors. "training" counts memory while QPiSSA trains: the
            residual, and of the factors the trained copy in float32, its gradient and its optimizer's state.
    """
    if count == "stored":
        return choice.num_bytes(shape, factor_bytes)
    if choice.rank == 0:
        return residual_bytes(choice.codec, shape)
    pair = [TensorShape((shape[0], choice.rank), TRAINED), TensorShape((choice.rank, shape[1]), TRAINED)]
    # of a second pair, since the first pays for tables that all share
    state = (
        optimizer_bytes(OPTIMIZER, pair * 2, on_gpu=True).device - optimizer_bytes(OPTIMIZER, pair, on_gpu=True).device
    )
    return residual_bytes(choice.codec, shape) + 2 * total_bytes(pair) + state
