"""What quantization cost one weight: plain quantization before, the split after."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Norms:
    """Norms of one error matrix, in the weight's own units.

    nuclear_error is the standard error of a stochastic nuclear norm, 0 when it is exact.
    """

    frobenius: float
    nuclear: float
    nuclear_error: float
    spectral: float


@dataclass(frozen=True)
class WeightError:
    """The error of one weight W [out, in]: of codec(W) before, of the stored split after.

    bits counts all that is stored for the split, factors included, per element of W.
    weight_frobenius is ||W||_F, by which a Frobenius error becomes relative.
    """

    name: str
    role: str
    shape: tuple[int, int]
    rank: int
    bits: float
    iteration: int
    weight_frobenius: float
    before: Norms
    after: Norms
