"""Totals of the errors of several weights: of one layer type, or of the whole model."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from qsvd.errors import BadInput
from qsvd.records import Norms, Role, WeightError

ROLES: tuple[str, ...] = get_args(Role)
MODEL = "model"  # the role of the total of all weights


@dataclass(frozen=True)
class Total:
    """The norms of the block-diagonal matrix of several weights.

    Frobenius norms and standard errors (the estimates are independent) therefore add in squares, nuclear norms add, and
    the spectral norm is the largest.

    role is one of ROLES, or MODEL; weights is the number of matrices; bits is the stored bits per element, factors
    included.
    """

    role: str
    weights: int
    elements: int
    bits: float
    weight_frobenius: float
    before: Norms
    after: Norms


@dataclass(frozen=True)
class Reduction:
    """The reduction of each norm of the error in percent, 100 (1 - after / before); negative if it grew."""

    frobenius: float
    nuclear: float
    spectral: float


def totals(errors: Sequence[WeightError]) -> list[Total]:
    """Return one total per role that occurs, in the order of ROLES, then one for the model.

    Raises:
        BadInput: errors is empty, a role is not in ROLES, or a weight occurs twice.
    """
    if not errors:
        raise BadInput("no weight was measured, so there is no total")
    unknown = sorted({error.role for error in errors} - set(ROLES))
    if unknown:
        raise BadInput(f"unknown role {', '.join(unknown)}; a weight's role is one of {', '.join(ROLES)}")
    twice = sorted(name for name, times in Counter(error.name for error in errors).items() if times > 1)
    if twice:
        raise BadInput(f"weights measured more than once: {', '.join(twice)}")
    by_role = {role: [error for error in errors if error.role == role] for role in ROLES}
    return [_total(role, members) for role, members in by_role.items() if members] + [_total(MODEL, errors)]


def worst(errors: Sequence[WeightError], count: int) -> list[WeightError]:
    """Return the `count` weights with the largest relative Frobenius error after, largest first, equal ones by name.

    Raises:
        BadInput: count is below 0.
    """
    if count < 0:
        raise BadInput(f"count {count} is below 0, the least number of weights to list")
    return sorted(errors, key=lambda error: (-relative(error)[1], error.name))[:count]


def relative(error: WeightError | Total) -> tuple[float, float]:
    """Return the relative Frobenius error ||E|| / ||W|| before and after; 0 for an exact zero weight."""
    before, after = error.before.frobenius, error.after.frobenius
    return _ratio(before, error.weight_frobenius), _ratio(after, error.weight_frobenius)


def reduction(error: WeightError | Total) -> Reduction:
    """Return the reduction of each norm in percent; 0 if the norm before is 0."""
    before, after = error.before, error.after
    return Reduction(
        frobenius=_percent(before.frobenius, after.frobenius),
        nuclear=_percent(before.nuclear, after.nuclear),
        spectral=_percent(before.spectral, after.spectral),
    )


def _total(role: str, errors: Sequence[WeightError]) -> Total:
    sizes = [math.prod(error.shape) for error in errors]
    stored = math.fsum(error.bits * size for error, size in zip(errors, sizes, strict=True))
    return Total(
        role=role,
        weights=len(errors),
        elements=sum(sizes),
        bits=stored / sum(sizes),
        weight_frobenius=math.hypot(*(error.weight_frobenius for error in errors)),
        before=_together([error.before for error in errors]),
        after=_together([error.after for error in errors]),
    )


def _together(norms: Sequence[Norms]) -> Norms:
    """Return the norms of the block-diagonal matrix of matrices with these norms."""
    return Norms(
        frobenius=math.hypot(*(norm.frobenius for norm in norms)),
        nuclear=math.fsum(norm.nuclear for norm in norms),
        nuclear_error=math.hypot(*(norm.nuclear_error for norm in norms)),
        spectral=max(norm.spectral for norm in norms),
    )


def _ratio(part: float, whole: float) -> float:
    if whole == 0:
        return 0.0 if part == 0 else math.inf
    return part / whole


def _percent(before: float, after: float) -> float:
    return 100 * (1 - after / before) if before else 0.0
