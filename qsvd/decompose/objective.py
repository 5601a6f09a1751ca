"""What the best split is: the plain error, or one weighted by how much each row and each column matters.

LQ-LoRA (arXiv:2311.12023, section 3.3) weights the squared error of every number by its empirical Fisher information
F_ij, approximated by its row and column means, so that rows and columns can be scaled before the SVD and back after it:
F_ij ~ mean_j F_ij * mean_i F_ij / mean F.

Shape suffixes: O = out features, I = in features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = 1e-6  # of the mean: a row that no example touched may be wrong, but not by any amount


@dataclass(frozen=True)
class Objective:
    """The error of a split is || diag(rows) (W - Q - B A) diag(columns) ||_F.

    Args:
        rows_O, columns_I: float32, above zero; None is all ones.
    """

    rows_O: Tensor | None = None
    columns_I: Tensor | None = None

    def scaled(self, matrix_OI: Tensor) -> Tensor:
        """diag(rows) M diag(columns), float32; the matrix itself where nothing is weighted."""
        if self.rows_O is not None:
            matrix_OI = matrix_OI * self.rows_O[:, None]
        return matrix_OI if self.columns_I is None else matrix_OI * self.columns_I

    def to(self, device: torch.device) -> "Objective":
        """The same on another device."""
        rows, columns = self.rows_O, self.columns_I
        return Objective(*(None if one is None else one.to(device) for one in (rows, columns)))


PLAIN = Objective()


def fisher(rows_O: Tensor, columns_I: Tensor) -> Objective:
    """The objective of these moments of the gradient: ||.||^2 is the sum over F_ij E_ij^2 with the approximated F.

    Args:
        rows_O, columns_I: float32, mean_j F_ij and mean_i F_ij, not negative; each is raised to FLOOR of the mean, and
            where all are zero the objective is plain.
    """
    mean = rows_O.double().mean()
    if mean == 0:
        return PLAIN
    rows, columns = (moments.double().clamp(min=FLOOR * float(mean)) for moments in (rows_O, columns_I))
    return Objective(rows.sqrt().float(), (columns / mean).sqrt().float())
