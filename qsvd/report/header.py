"""What was done to which part of a model: the head of every report."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qsvd.errors import listing
from qsvd.records import Coverage, LeftTensors

if TYPE_CHECKING:
    from qsvd.numerics.codec import Codec

ROUNDINGS = {"absmax": "", "mse": ", scales of least error", "feedback": ", rounded with error feedback"}


@dataclass(frozen=True)
class ReportHeader:
    """The model, the method that was asked for, and the part of the model that was quantized.

    Args:
        codec: One codec by name, or several: "nf2, nf3 and nf4".
        rank: The highest rank of the components.
        order, end: Words of the options: what comes first, and what each iteration ends with.
        iterations: The most that were allowed; 0 if the parts were drawn at random.
        least_rank: The lowest rank; None if all are equal.
        residual_bits: Bits of the residuals for each element of the weights; None if one codec says it.
        quantizer: The library that loads the residual into transformers.
        objective: What the splits minimise, "plain" or "fisher".
        sensitivity: What errors are weighted by: "inputs", or "both": gradients, too; "" without texts.
        texts: Number of texts of the calibration.
        rounding: How residuals are rounded: "absmax" or "mse", by the scales of nearest codes, or "feedback".
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
    rounding: str = "absmax"
    sensitivity: str = ""
    texts: int = 0

    @property
    def _codecs(self) -> str:
        return self.codec.upper().replace(" AND ", " and ")

    @property
    def before(self) -> str:
        """Name in tables of plain quantization, every weight in the codec of its residual: "NF4 alone"."""
        return f"{self._codecs} alone"

    @property
    def method(self) -> str:
        """How the weights were split, in one line."""
        codec, bits = self._codecs, ""
        if self.residual_bits is not None:
            bits = f" of {self.residual_bits:.3f} bits per element"
        if self.iterations > 0 and self.rank == 0:
            weighted = f", weighted by {self.weighted_by}" if self.sensitivity else ""
            return f"{codec}{bits} without components (rank 0){weighted}{ROUNDINGS[self.rounding]}"
        ranks = f"rank {self.rank}"
        if self.least_rank not in (None, self.rank):
            ranks = f"ranks {self.least_rank} to {self.rank}"
        parts = f"{codec} residual{'s' if bits else ''}{bits} + components of {ranks}"
        if self.iterations == 0:
            return f"{parts}, all drawn at random"
        iterations = "1 iteration" if self.iterations == 1 else f"up to {self.iterations} iterations"
        weighted = ", weighted by Fisher information" if self.objective == "fisher" else ""
        weighted = f", weighted by {self.weighted_by}" if self.sensitivity else weighted
        return f"{parts}; {self.order} first, {iterations}, ending with {self.end}{weighted}{ROUNDINGS[self.rounding]}"

    @property
    def weighted_by(self) -> str:
        """What weights errors, in words: "inputs and gradients of 128 texts"."""
        moments = "inputs and gradients" if self.sensitivity == "both" else "inputs"
        return f"{moments} of {self.texts:,} {'text' if self.texts == 1 else 'texts'}"

    @property
    def reach(self) -> str:
        """How much of the model was quantized, in one line."""
        covered = self.coverage
        return (
            f"{covered.weights:,} {'layer' if covered.weights == 1 else 'layers'} quantized, "
            f"{covered.elements_split:,} of {covered.elements:,} elements ({100 * covered.share:.2f} %)"
        )

    @property
    def remainder(self) -> str:
        """What the checkpoint has and the model does not, in one line; "" if there is nothing."""
        unknown = self.coverage.unknown
        if not unknown:
            return ""
        sizes = LeftTensors("", sum(group.count for group in unknown), sum(group.elements for group in unknown))
        return f"{sizes.size}: {listing([group.pattern for group in unknown], 3)}"

    @property
    def kept(self) -> str:
        """Which linear layers of the blocks stay in 16 bits and why, in one sentence; "" if all were quantized."""
        reasons: dict[str, list[str]] = {}
        for left in self.coverage.left:
            if left.reason:
                reasons.setdefault(left.reason, []).append(left.pattern)
        parts = [f"{listing([f'`{name}`' for name in names])} ({reason})" for reason, names in reasons.items()]
        return f"In 16 bits: {'; '.join(parts)}." if parts else ""


def codec_words(codecs: Sequence["Codec"]) -> str:
    """Return one codec by its name, several by the numbers of their bits: "nf2, nf3 and nf4"."""
    from qsvd.numerics.names import spelling

    spellings = {spelling(codec) for codec in codecs}
    if len(spellings) == 1:
        return spellings.pop()
    *names, last = sorted({f"nf{codec.bits}" for codec in codecs})
    return f"{', '.join(names)} and {last}" if names else last
