"""What was done to which part of a model: the head of every report."""

from dataclasses import dataclass

from qsvd.plan.model import Coverage, LeftTensors


@dataclass(frozen=True)
class Header:
    """The model, the method as it was asked for, and which part of the model it reached.

    codec, order and end are words of the options (order: what comes first; end: what each iteration ends with); rank
    is of the factors, iterations the most allowed; 0 iterations stand for parts that were drawn at random, not split.
    """

    model: str
    codec: str
    rank: int
    order: str
    iterations: int
    end: str
    coverage: Coverage

    @property
    def before(self) -> str:
        """The name of the state before in a table: the codec on the weight itself."""
        return f"{self.codec.upper()} alone"

    @property
    def method(self) -> str:
        """One line on how the weights were split."""
        if self.iterations == 0:
            return f"{self.codec.upper()} residual + factors of rank {self.rank}, all drawn at random"
        if self.rank == 0:
            return f"{self.codec.upper()} without factors (rank 0)"
        iterations = "1 iteration" if self.iterations == 1 else f"up to {self.iterations} iterations"
        return (
            f"{self.codec.upper()} residual + factors of rank {self.rank}; {self.order} first, {iterations}, "
            f"ending with {self.end}"
        )

    @property
    def reach(self) -> str:
        """One line on how much of the model was split."""
        covered = self.coverage
        noun = "weight" if covered.weights == 1 else "weights"
        return (
            f"{covered.weights:,} {noun} split, {covered.elements_split:,} of {covered.elements:,} elements "
            f"({100 * covered.share:.2f} %)"
        )


def left_line(left: LeftTensors) -> str:
    """How many tensors and elements stay as they were under one pattern."""
    noun = "tensor" if left.count == 1 else "tensors"
    return f"{left.count:,} {noun}, {left.elements:,} elements"
