"""The error that a layer's inputs feel, and the loss: tr(G E H E^T), with E = W - Q - B A.

H = E[x x^T] is the second moment of the layer's inputs, so that tr(E H E^T) is the mean squared error of its outputs
(QERA, arXiv:2410.06040). G = E[g g^T] is that of the gradient of the loss at its outputs, for labels drawn from the
model: with both, the error is the second-order change of the loss in the approximation of K-FAC (arXiv:1503.05671).

With H = L_i L_i^T and G = L_o L_o^T the error is || L_o^T E L_i ||_F^2, so that the best factors come from the SVD of
L_o^T (W - Q) L_i.

Shape suffixes: S = matrices of a stack (1 here), O = out features, I = in features, R = rank, J = some columns.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qsvd.decompose.objective import Metric
from qsvd.errors import BadInput
from qsvd.numerics.codec import SMALLEST_SCALE
from qsvd.numerics.norms import squares
from qsvd.numerics.svd import Product

INPUT_DAMPING, OUTPUT_DAMPING = 0.01, 0.1  # shares of the mean of the diagonal that are added to it
MORE_DAMPING, MOST_DAMPING = 10.0, 1e6  # times the last one where a factorization fails, and where that is our fault
BAND = 512  # rows or columns measured at a time


@dataclass(frozen=True)
class Moments:
    """Second moments of what the errors of one weight meet. The mean of the diagonal of each is scaled to 1.

    Args:
        inputs_II: H, float32 [I, I], symmetric and positive semidefinite; zero counts as the identity.
        outputs_OO: G, float32 [O, O]; None counts as the identity.

    Raises:
        BadInput: a moment is not a square float32 matrix, or not finite; both sides in one message.
    """

    inputs_II: Tensor
    outputs_OO: Tensor | None = None

    def __post_init__(self):
        sides = (("inputs", self.inputs_II), ("outputs", self.outputs_OO))
        wrong = [f"the moment of the {side} {problem}" for side, one in sides if (problem := _problem(one))]
        if wrong:
            raise BadInput("; ".join(wrong))

    @property
    def is_plain(self) -> bool:
        """Whether all errors count equally."""
        return False

    def check_fits(self, shape: tuple[int, ...]) -> None:
        """Raise BadInput unless the moments are those of a weight of this shape."""
        sides = (("rows", shape[0], self.outputs_OO), ("columns", shape[1], self.inputs_II))
        wrong = [f"{len(one)} {side} for {size}" for side, size, one in sides if one is not None and len(one) != size]
        if wrong:
            raise BadInput(f"the moments are those of {' and '.join(wrong)} of a {shape} matrix")

    @cached_property
    def inputs(self) -> "_Side":
        """H with damping, and L_i."""
        return _Side.of(self.inputs_II, INPUT_DAMPING)

    @cached_property
    def outputs(self) -> "_Side | None":
        """G with damping, and L_o; None without G."""
        return None if self.outputs_OO is None else _Side.of(self.outputs_OO, OUTPUT_DAMPING)

    def scaled(self, matrix_SOI: Tensor) -> Product:
        """Return L_o^T M L_i."""
        return Product(matrix_SOI, self.inputs.root_NN, None if self.outputs is None else self.outputs.root_NN)

    def scaled_columns(self, matrix_SRI: Tensor) -> Tensor:
        """Return M L_i, float32."""
        return matrix_SRI @ self.inputs.root_NN

    def unscaled(self, up_SOR: Tensor, down_SRI: Tensor) -> tuple[Tensor, Tensor]:
        """Return L_o^-T up and down L_i^-1, float32."""
        down_SRI = torch.linalg.solve_triangular(self.inputs.root_NN, down_SRI, upper=False, left=False)
        if self.outputs is not None:
            up_SOR = torch.linalg.solve_triangular(self.outputs.root_NN.mT, up_SOR, upper=True)
        return up_SOR, down_SRI

    @property
    def magnitude(self) -> float:
        """The product of the means of both diagonals, which errors are divided by: with G they compare layers."""
        return self.inputs.mean * (1.0 if self.outputs is None else self.outputs.mean)

    def squares(self, left_SOI: Tensor, up_SOR: Tensor, down_SRI: Tensor) -> Tensor:
        """Return || L_o^T (left - up down) L_i ||_F^2, float64 [S]."""
        error_SOI = torch.baddbmm(left_SOI, up_SOR, down_SRI, alpha=-1)
        squares_S = torch.zeros(len(error_SOI), dtype=torch.float64, device=error_SOI.device)
        for first in range(0, error_SOI.shape[-1], BAND):  # the roots are triangular
            scaled_SOJ = error_SOI[..., first:] @ self.inputs.root_NN[first:, first : first + BAND]
            if self.outputs is None:
                squares_S += squares(scaled_SOJ)
                continue
            root_OO = self.outputs.root_NN
            for row in range(0, len(root_OO), BAND):
                squares_S += squares(root_OO[row:, row : row + BAND].mT @ scaled_SOJ[:, row:])
        return squares_S

    def metric(self, up_OR: Tensor, down_RI: Tensor, damping: float) -> Metric:
        """Return what errors meet that factors near these do not absorb; see Metric."""
        outputs_OO = None if self.outputs is None else self.outputs.deflated(up_OR, damping)
        return Metric(self.inputs.deflated(down_RI.mT, damping), outputs_OO, self.inputs.diagonal_N)

    def to(self, device: torch.device) -> "Moments":
        """Return these moments on a device; themselves if they are there, with the factors that were computed."""
        if self.inputs_II.device == device:
            return self
        outputs_OO = None if self.outputs_OO is None else self.outputs_OO.to(device)
        return Moments(self.inputs_II.to(device), outputs_OO)


@dataclass(frozen=True)
class _Side:
    """A moment divided by the mean of its diagonal, with damping: L L^T = moment / mean + share * identity.

    Args:
        given_NN: The moment, as it was given.
        mean: Of its diagonal; 0 stands for the identity.
        share: What is added to the diagonal; more where numbers are too far apart for a factorization.
        root_NN: L, lower triangular.
    """

    given_NN: Tensor
    mean: float
    share: float
    root_NN: Tensor

    @classmethod
    def of(cls, given_NN: Tensor, share: float) -> "_Side":
        """Return a moment with at least this share of damping."""
        mean = float(given_NN.diagonal().double().mean())
        mean = mean if mean > SMALLEST_SCALE else 0.0
        while True:
            root_NN, info = torch.linalg.cholesky_ex(_damped(given_NN, mean, share))
            if int(info) == 0:
                return cls(given_NN, mean, share, root_NN)
            share *= MORE_DAMPING
            assert share < MOST_DAMPING, "a matrix with a large diagonal has a factor"

    @property
    def diagonal_N(self) -> Tensor:
        """The diagonal of L L^T."""
        return self.root_NN.square().sum(dim=1)

    def deflated(self, factors_NR: Tensor, damping: float) -> Tensor:
        """Return L (I - V V^T) L^T with damping; the columns of V are an orthonormal basis of those of L^T factors."""
        span_NR = torch.linalg.qr(self.root_NN.mT @ factors_NR)[0]
        seen_NR = self.root_NN @ span_NR
        moment_NN = _damped(self.given_NN, self.mean, self.share).addmm_(seen_NR, seen_NR.mT, alpha=-1)
        moment_NN.diagonal().add_(damping)  # the mean of the diagonal of L L^T is about 1
        return moment_NN


def _damped(given_NN: Tensor, mean: float, share: float) -> Tensor:
    """Return a moment divided by the mean of its diagonal, with damping; the identity where the mean is 0."""
    if mean == 0:
        return torch.eye(len(given_NN), device=given_NN.device)
    damped_NN = given_NN / mean
    damped_NN.diagonal().add_(share)
    return damped_NN


def _problem(moment: Tensor | None) -> str:
    """Describe what is wrong with a moment; empty if nothing is."""
    if moment is None:
        return ""
    if moment.ndim != 2 or moment.shape[0] != moment.shape[1] or moment.dtype != torch.float32:
        return f"is {moment.dtype} {tuple(moment.shape)}, not a square float32 matrix"
    bad = int((~torch.isfinite(moment)).sum())
    return f"has {bad} of {moment.numel()} values that are NaN or infinite" if bad else ""
