"""The budget of an allocation, as people write it: "2.75bits" for each number that is split, or "20GB" for all."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, prod

from qsvd.errors import BINARY, UNITS, BadInput, parse_size
from qsvd.plan.weights import WeightSpec

MOST_BITS = 16  # what the weights have as they are
BITS = re.compile(r"(\d+(?:\.\d+)?)\s*bits?", re.IGNORECASE)
UNIT = re.compile(r"[KMGT]I?B")


@dataclass(frozen=True)
class Budget:
    """Bytes for everything that is split.

    Args:
        text: As it was written.
        num_bytes: All in all.
        num_elements: Numbers of the weights that are split.
        unit: "bits", or one of bytes, "GB" or "GIB".
    """

    text: str
    num_bytes: int
    num_elements: int
    unit: str

    @property
    def most_bytes(self) -> int:
        """Above which a budget is refused."""
        return MOST_BITS * self.num_elements // 8

    def enough(self, num_bytes: int) -> str:
        """The least budget that holds so many bytes, in the same unit, with three decimals."""
        exact = (
            Fraction(8 * num_bytes, self.num_elements) if self.unit == "bits" else Fraction(num_bytes, _size(self.unit))
        )
        unit = self.unit.replace("I", "i")
        return f"{ceil(exact * 1000) / 1000:.3f}{unit}"


def parse_budget(text: str, weights: Sequence[WeightSpec], flag: str = "--budget") -> Budget:
    """The budget of these weights.

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
            f"{flag} {text!r} is no budget: give bits for each number that is split, such as 2.75bits, or bytes for "
            "all of them with KB, MB, GB, TB, KiB, MiB, GiB or TiB, such as 20GB"
        )
    budget = Budget(text, num_bytes, num_elements, name)
    if num_bytes > budget.most_bytes:
        raise BadInput(
            f"{flag} {text} is above {MOST_BITS} bits a number ({budget.enough(budget.most_bytes)}), which "
            "the weights take as they are; give less, or leave the model as it is"
        )
    return budget


def _size(unit: str) -> int:
    return (UNITS | BINARY)[unit]
