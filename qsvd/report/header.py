"""What was done to which part of a model: the head of every report."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qsvd.records import Coverage

if TYPE_CHECKING:
    from qsvd.numerics.codec import Codec


@dataclass(frozen=True)
class ReportHeader:
    """The model, the method as it was asked for, and which part of the model it reached.

    codec, order and end are words of the options (order: what comes first; end: what each iteration ends with);
    iterations is the most allowed; 0 stands for parts that were drawn at random, not split. rank is the highest of the
    factors and least_rank the lowest, None where it is the same; residual_bits is what the residuals take for each
    number of the weights, None where they have one codec that says it. quantizer is the library that loads the residual
    into transformers; objective is what the splits minimise, "plain" or "fisher".
    """

    model: str
    codec: str
    rank: int
    order: str
    iterations: int
    end: str
    coverage: Coverage
    least_rank: int | None = None
    residual_bits: float | None = None
    quantizer: str = "bitsandbytes"
    objective: str = "plain"

    @property
    def before(self) -> str:
        """The name of the state before in a table: the codec on the weight itself."""
        return f"{self.codec.upper()} alone"  # every weight in the codec that its residual is in

    @property
    def residual(self) -> str:
        """In words."""
        if self.residual_bits is None:
            return f"{self.codec.upper()} residual"
        return f"{self.codec.upper()} residuals of {self.residual_bits:.3f} bits a weight"

    @property
    def factors(self) -> str:
        """In words."""
        if self.least_rank in (None, self.rank):
            return f"factors of rank {self.rank}"
        return f"factors of ranks {self.least_rank} to {self.rank}"

    @property
    def method(self) -> str:
        """One line on how the weights were split."""
        if self.iterations == 0:
            return f"{self.residual} + {self.factors}, all drawn at random"
        if self.rank == 0:
            bits = "" if self.residual_bits is None else f" of {self.residual_bits:.3f} bits a weight"
            return f"{self.codec.upper()}{bits} without factors (rank 0)"
        iterations = "1 iteration" if self.iterations == 1 else f"up to {self.iterations} iterations"
        weighted = ", weighted by Fisher information" if self.objective == "fisher" else ""
        return f"{self.residual} + {self.factors}; {self.order} first, {iterations}, ending with {self.end}{weighted}"

    @property
    def reach(self) -> str:
        """One line on how much of the model was split."""
        covered = self.coverage
        noun = "weight" if covered.weights == 1 else "weights"
        return (
            f"{covered.weights:,} {noun} split, {covered.elements_split:,} of {covered.elements:,} elements "
            f"({100 * covered.share:.2f} %)"
        )


def codec_words(codecs: Sequence["Codec"]) -> str:
    """One codec by its name, several by the numbers of their bits: "nf2, nf3 and nf4"."""
    from qsvd.numerics.names import spelling  # imports torch

    spellings = {spelling(codec) for codec in codecs}
    if len(spellings) == 1:
        return spellings.pop()
    *names, last = sorted({f"nf{codec.bits}" for codec in codecs})
    return f"{', '.join(names)} and {last}" if names else last
