"""The candidates of a weight: the codecs and ranks that are tried, and the bytes of each pair.

Shape suffixes: O = out features, I = in features; a weight [O, I] has factors [O, R] and [R, I].
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from qsvd.errors import BadInput, listing
from qsvd.numerics.names import codec_named
from qsvd.plan.allocation import Choice, holding_problems, mixing_problems, residual_bytes
from qsvd.plan.tensors import TensorShape, optimizer_bytes, total_bytes
from qsvd.plan.weights import WeightSpec

# Of 176 NormalFloat codecs, mixtures of these leave the least error on weights of three models at any budget: fitted
# scales, nested to about as few bits as the codes. For each number of bits there is a small and an accurate one.
CODECS = (
    *("nf2-128-3x64-fit", "nf2-32-3x64-fit", "nf3-64-4x64-fit", "nf3-16-4x64-fit"),
    *("nf4-64-4x64-fit", "nf4-16-4x64-fit", "nf8-128-8x256"),
)
CONTROL = "nf4-32-4x64-fit"  # without components: smaller blocks for the bytes that components take
MOST_RANKS = 8  # of the ladder, with 0
FACTOR_BITS = 4.0  # most bits of factors per number of the weight; codes with twice the bits gain more for as many
TRAINED_DTYPE = torch.float32  # of factors in `qsvd train`, unless there are too many
OPTIMIZER = "paged_adamw_8bit"  # the default of `qsvd train` on a GPU

CountedAs = Literal["stored", "training"]


@dataclass(frozen=True)
class Grid:
    """Codecs and ranks to try. A rank above the shorter side of a weight is cut to it.

    Args:
        codecs: Their names.
        ranks: For every weight; None is the ladder.
        rank: The rank of every weight with allocator "bits".
        control: The one of the codecs that is tried without components alone; None if there is none.
    """

    codecs: tuple[str, ...]
    ranks: tuple[int, ...] | None
    rank: int
    control: str | None = None

    def offered(self, shape: tuple[int, int]) -> tuple[int, ...]:
        """Return the ranks that an [O, I] weight may get, in rising order."""
        if self.ranks is None:
            return ladder(shape)
        return tuple(sorted({min(rank, min(shape)) for rank in self.ranks}))

    def fixed(self, shape: tuple[int, int]) -> int:
        """Return the rank of an [O, I] weight with allocator "bits"."""
        return min(self.rank, min(shape))

    def measured(self, shape: tuple[int, int], *, with_fixed: bool) -> tuple[int, ...]:
        """Return the ranks to measure, rising from 0; only allocator "bits" needs the fixed one."""
        fixed = (self.fixed(shape),) if with_fixed else ()
        return tuple(sorted({0, *fixed, *self.offered(shape)}))

    def choices(self, ranks: Sequence[int]) -> list[Choice]:
        """Return every codec at each of these ranks; the control at rank 0 alone."""
        return [Choice(codec_named(name), rank) for rank in ranks for name in self.codecs_for(rank)]

    def codecs_for(self, rank: int) -> list[str]:
        """Return the codecs that are tried at a rank."""
        return [name for name in self.codecs if rank == 0 or name != self.control]


def ladder(shape: tuple[int, int]) -> tuple[int, ...]:
    """Return 0 and the highest powers of two whose 16-bit factors take at most FACTOR_BITS per number of the weight."""
    most = FACTOR_BITS * math.prod(shape) / (16 * sum(shape))
    powers = [2**power for power in range(MOST_RANKS + 24) if 2**power <= most]
    return (0, *powers[1 - MOST_RANKS :])


def grid_of(codecs: Sequence[str], ranks: Sequence[int], rank: int, weights: Sequence[WeightSpec]) -> Grid:
    """Return the grid of the options.

    Args:
        codecs, ranks: Values of --codecs and --ranks; empty for the defaults.
        rank: Value of --rank.

    Raises:
        BadInput: a codec is unknown or cannot be mixed with the others, or a rank is negative or above the shorter side
            of every weight. The message lists all problems.
    """
    names = tuple(dict.fromkeys(codecs)) or (*CODECS, CONTROL)
    wrong = []
    for name in names:
        try:
            codec_named(name)
        except BadInput as error:
            wrong.append(f"--codecs: {error}")
    if not wrong:
        found = [codec_named(name) for name in names]
        problems = mixing_problems(found) or holding_problems({spec.group: found[0] for spec in weights}, weights)
        wrong = [f"--codecs: {problem}" for problem in problems]
    limit = max(min(spec.shape) for spec in weights)
    outside = [str(one) for one in sorted({*ranks}) if not 0 <= one <= limit]
    if outside:
        wrong.append(f"--ranks {listing(outside)} are outside 0..{limit}, the ranks of the largest weights")
    if rank < 0:
        wrong.append(f"--rank {rank} is negative; 0 means no components")
    if wrong:
        raise BadInput("; ".join(wrong))
    return Grid(names, tuple(sorted({*ranks})) or None, rank, control=None if codecs else CONTROL)


def counted_bytes(choice: Choice, shape: tuple[int, int], factor_bytes: int, count: CountedAs) -> int:
    """Return the bytes of a choice that count against the budget.

    Args:
        factor_bytes: Bytes of a stored number of the factors.
        count: "stored" counts the file: codes, scales, factors. "training" counts memory while QPiSSA trains: the
            residual, and for the factors the trained copy in float32, its gradient and its optimizer state.
    """
    if count == "stored":
        return choice.num_bytes(shape, factor_bytes)
    pair = [TensorShape((shape[0], choice.rank), TRAINED_DTYPE), TensorShape((choice.rank, shape[1]), TRAINED_DTYPE)]
    # the state of a second pair, because the first one also counts the tables that all pairs share
    one, two = (optimizer_bytes(OPTIMIZER, pair * pairs, on_gpu=True).device for pairs in (1, 2))
    state = two - one
    return residual_bytes(choice.codec, shape) + 2 * total_bytes(pair) + state
