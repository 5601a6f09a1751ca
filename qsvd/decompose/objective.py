"""The error that the best split minimizes: plain, or weighted by the importance of each row and each column.

LQ-LoRA (arXiv:2311.12023, section 3.3) weights the squared error of every number by its empirical Fisher information
F_ij, approximated by its row and column means, so that rows and columns can be scaled before the SVD and back after it:
F_ij ~ mean_j F_ij * mean_i F_ij / mean F.

Shape suffixes: S = matrices of a stack, O = out features, I = in features, R = rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qsvd.errors import BadInput
from qsvd.numerics import norms

FLOOR = 1e-6  # of the mean, the least moment: rows that no example used keep a small weight, so that no error is free
SIDES = ("rows", "columns")
ROWS = 1024  # measured at a time


@dataclass(frozen=True)
class Metric:
    """The error that error feedback lowers: tr(M_O E M_I E^T).

    The moments leave out what factors that are fitted after the rounding remove from E, and have damping.

    Args:
        inputs_II: M_I, float32, positive definite.
        outputs_OO: M_O; None is the identity: rows do not meet each other.
        columns_I: Weights of the squared errors of the columns, for the choice of scales; None is 1.
    """

    inputs_II: Tensor
    outputs_OO: Tensor | None = None
    columns_I: Tensor | None = None


@dataclass(frozen=True)
class Objective:
    """The error of a split is || diag(rows) (W - Q - B A) diag(columns) ||_F.

    Args:
        rows_O, columns_I: float32, above zero; None is all ones. [S, O] and [S, I] are those of a stack of S matrices.

    Raises:
        BadInput: a weight is not finite or not above zero, or has another dtype or shape; both sides in one message.
    """

    rows_O: Tensor | None = None
    columns_I: Tensor | None = None

    def __post_init__(self):
        wrong = [
            f"the weights of {side} {problem}"
            for side, weights in zip(SIDES, (self.rows_O, self.columns_I), strict=True)
            if weights is not None and (problem := _problem(weights))
        ]
        if wrong:
            raise BadInput("; ".join(wrong))

    @property
    def is_plain(self) -> bool:
        """Whether all errors count equally."""
        return self.rows_O is None and self.columns_I is None

    def check_fits(self, shape: tuple[int, ...]) -> None:
        """Raise BadInput unless the numbers of weights are the numbers of rows and columns of this shape."""
        wrong = [
            f"{weights.numel()} {side} for {size}"
            for side, size, weights in zip(SIDES, shape, (self.rows_O, self.columns_I), strict=True)
            if weights is not None and weights.shape != (size,)
        ]
        if wrong:
            raise BadInput(f"the objective has weights of {' and '.join(wrong)} of a {shape} matrix")

    def scaled(self, matrix_OI: Tensor) -> Tensor:
        """Return diag(rows) M diag(columns), float32; the matrix itself if nothing is weighted."""
        if self.rows_O is None:
            return self.scaled_columns(matrix_OI)
        scaled_OI = matrix_OI * self.rows_O[..., None]
        return scaled_OI if self.columns_I is None else scaled_OI.mul_(self.columns_I[..., None, :])

    def scaled_columns(self, matrix_OI: Tensor) -> Tensor:
        """Return M diag(columns), float32."""
        return matrix_OI if self.columns_I is None else matrix_OI * self.columns_I[..., None, :]

    def unscaled(self, up_OR: Tensor, down_RI: Tensor) -> tuple[Tensor, Tensor]:
        """Return diag(rows)^-1 up and down diag(columns)^-1, float32."""
        if self.rows_O is not None:
            up_OR = up_OR / self.rows_O[..., None]
        return up_OR, down_RI if self.columns_I is None else down_RI / self.columns_I[..., None, :]

    def squares(self, left_SOI: Tensor, up_SOR: Tensor, down_SRI: Tensor) -> Tensor:
        """Return || diag(rows) (left - up down) diag(columns) ||_F^2, float64 [S], by a few rows at a time."""
        squares_S = torch.zeros(len(left_SOI), dtype=torch.float64, device=left_SOI.device)
        for start in range(0, left_SOI.shape[1], ROWS):
            rows = slice(start, start + ROWS)
            error_SOI = torch.baddbmm(left_SOI[:, rows], up_SOR[:, rows], down_SRI, alpha=-1)
            squares_S += norms.squares(self.of_rows(rows).scaled(error_SOI))
        return squares_S

    def metric(self, up_OR: Tensor, down_RI: Tensor, damping: float) -> Metric:
        """Return what errors meet that factors near these do not absorb; the weights of rows do not change it."""
        del up_OR
        columns_I = None if self.columns_I is None else self.columns_I[0]
        span_IR = torch.linalg.qr(self.scaled_columns(down_RI[None])[0].mT)[0]
        moment_II = -(span_IR @ span_IR.mT)
        moment_II.diagonal().add_(1)
        if columns_I is None:
            moment_II.diagonal().add_(damping)
            return Metric(moment_II)
        moment_II.mul_(columns_I).mul_(columns_I[:, None])
        squares_I = columns_I.square()
        moment_II.diagonal().add_(damping * float(squares_I.mean()))
        return Metric(moment_II, None, squares_I)

    def of_rows(self, rows: slice) -> "Objective":
        """Return the objective of a matrix of these rows alone."""
        return self if self.rows_O is None else Objective(self.rows_O[..., rows], self.columns_I)

    def to(self, device: torch.device) -> "Objective":
        """Return a copy on another device."""
        return Objective(*(None if one is None else one.to(device) for one in (self.rows_O, self.columns_I)))


PLAIN = Objective()


def stacked(objectives: Sequence[Objective], shape: tuple[int, int]) -> Objective:
    """Return the objective of a stack of [O, I] matrices, from those of the matrices; they are on one device."""
    if len(objectives) == 1:
        rows_O, columns_I = objectives[0].rows_O, objectives[0].columns_I
        return Objective(*(None if one is None else one[None] for one in (rows_O, columns_I)))
    sides = zip(shape, zip(*((one.rows_O, one.columns_I) for one in objectives), strict=True), strict=True)
    return Objective(*(_side(size, weights) for size, weights in sides))


def _side(size: int, weights: Sequence[Tensor | None]) -> Tensor | None:
    """Return the weights of one side [S, size]; None if no matrix has any."""
    known = next((one for one in weights if one is not None), None)
    return None if known is None else torch.stack([known.new_ones(size) if one is None else one for one in weights])


def fisher(rows_O: Tensor, columns_I: Tensor) -> Objective:
    """Return the objective of moments of the gradient: its ||.||^2 is the sum of F_ij E_ij^2 with the approximated F.

    Args:
        rows_O, columns_I: float32, mean_j F_ij and mean_i F_ij, not negative. Each is at least FLOOR of the mean; if
            all are zero, the objective is plain.

    Raises:
        BadInput: a moment is negative, NaN or infinite.
    """
    both = torch.cat((rows_O.double(), columns_I.double()))
    bad = int((~(torch.isfinite(both) & (both >= 0))).sum())
    if bad:
        raise BadInput(f"{bad} of {both.numel()} moments of the gradient are negative, NaN or infinite")
    mean = float(rows_O.double().mean())
    if mean == 0:
        return PLAIN
    rows, columns = (moments.double().clamp(min=FLOOR * mean) for moments in (rows_O, columns_I))
    return Objective(rows.sqrt().float(), (columns / mean).sqrt().float())


def _problem(weights: Tensor) -> str:
    """Describe what is wrong with the weights of one side; empty if nothing is."""
    if weights.ndim not in (1, 2) or weights.dtype != torch.float32:
        return f"are {weights.dtype} {tuple(weights.shape)}, not a float32 vector"
    bad = int((~(torch.isfinite(weights) & (weights > 0))).sum())
    return f"are not all finite and above zero: {bad} of {weights.numel()}" if bad else ""
