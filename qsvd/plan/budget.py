"""The budget of an allocation as people write it: "2.75bits" per number of the weights, or "20GB" for all of them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, prod

from qsvd.errors import BINARY, UNITS, BadInput, parse_size
from qsvd.plan.weights import WeightSpec

MOST_BITS = 16  # of the weights that are not quantized
BITS = re.compile(r"(\d+(?:\.\d+)?)\s*bits?", re.IGNORECASE)
UNIT = re.compile(r"[KMGT]I?B")


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
        return f"{ceil(exact * 1000) / 1000:.3f}{self.unit.replace('I', 'i')}"


def parse_budget(text: str, weights: Sequence[WeightSpec], flag: str = "--budget") -> Budget:
    """Read the budget of these weights.

    Raises:
        BadInput: the text is neither bits nor bytes, or more than the weights take in 16 bits.
    """
    num_elements = sum(prod(spec.shape) for spec in weights)
    stripped = text.strip()
    found, unit = BITS.fullmatch(stripped), UNIT.search(stripped.upper())
    if found:
        num_bytes, name = int(Fraction(found[1]) * num_elements / 8), "bits"
    elif unit:
        num_bytes, name = parse_size(stripped, flag), unit[0]
    else:
        raise BadInput(
            f"{flag} {text!r} is not a budget: give bits per number of the weights, such as 2.75bits, or bytes for all "
            "weights in KB, MB, GB, TB, KiB, MiB, GiB or TiB, such as 20GB"
        )
    budget = Budget(text, num_bytes, num_elements, name)
    if num_bytes > budget.most_bytes:
        raise BadInput(
            f"{flag} {text} is above {MOST_BITS} bits a number ({budget.enough(budget.most_bytes)}), the size of "
            "the weights before quantization; give a smaller budget"
        )
    return budget
