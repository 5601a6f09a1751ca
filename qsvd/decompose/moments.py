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

INPUT_DAMPING, OUTPUT_DAMPING = 0.01, 0.1  # shares of the mean of the diagonal that are added to it
MORE_DAMPING, MOST_DAMPING = 10.0, 1e6  # times the last one where a factorization fails, and where that is our fault
BAND = 1024  # rows or columns measured at a time


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
    def input_root_II(self) -> Tensor:
        """L_i, lower triangular."""
        return _root(self.inputs_II, INPUT_DAMPING)

    @cached_property
    def output_root_OO(self) -> Tensor | None:
        """L_o, lower triangular; None without G."""
        return None if self.outputs_OO is None else _root(self.outputs_OO, OUTPUT_DAMPING)

    def scaled(self, matrix_SOI: Tensor) -> Tensor:
        """Return L_o^T M L_i, float32."""
        scaled_SOI = matrix_SOI @ self.input_root_II
        return scaled_SOI if self.output_root_OO is None else self.output_root_OO.mT @ scaled_SOI

    def scaled_columns(self, matrix_SRI: Tensor) -> Tensor:
        """Return M L_i, float32."""
        return matrix_SRI @ self.input_root_II

    def unscaled(self, up_SOR: Tensor, down_SRI: Tensor) -> tuple[Tensor, Tensor]:
        """Return L_o^-T up and down L_i^-1, float32."""
        down_SRI = torch.linalg.solve_triangular(self.input_root_II, down_SRI, upper=False, left=False)
        if self.output_root_OO is not None:
            up_SOR = torch.linalg.solve_triangular(self.output_root_OO.mT, up_SOR, upper=True)
        return up_SOR, down_SRI

    def squares(self, left_SOI: Tensor, up_SOR: Tensor, down_SRI: Tensor) -> Tensor:
        """Return || L_o^T (left - up down) L_i ||_F^2, float64 [S]."""
        down_SRI = self.scaled_columns(down_SRI)
        scaled_SOI = torch.empty_like(left_SOI)
        for first in range(0, left_SOI.shape[-2], BAND):
            rows = (..., slice(first, first + BAND), slice(None))
            torch.baddbmm(left_SOI[rows] @ self.input_root_II, up_SOR[rows], down_SRI, alpha=-1, out=scaled_SOI[rows])
        if self.output_root_OO is None:
            return scaled_SOI.square().sum(dim=(-2, -1), dtype=torch.float64)
        bands = (self.output_root_OO.mT @ band_SOJ for band_SOJ in scaled_SOI.split(BAND, dim=-1))
        return torch.stack([one.square().sum(dim=(-2, -1), dtype=torch.float64) for one in bands]).sum(dim=0)

    def metric(self, up_OR: Tensor, down_RI: Tensor, damping: float) -> Metric:
        """Return what errors meet that factors near these do not absorb; see Metric."""
        inputs_II = _deflated(self.input_root_II, down_RI.mT, damping)
        outputs_OO = None if self.output_root_OO is None else _deflated(self.output_root_OO, up_OR, damping)
        return Metric(
            inputs_II, outputs_OO, self.inputs_II.diagonal().clamp(min=0) + INPUT_DAMPING * _mean(self.inputs_II)
        )

    def to(self, device: torch.device) -> "Moments":
        """Return a copy on another device."""
        outputs_OO = None if self.outputs_OO is None else self.outputs_OO.to(device)
        return Moments(self.inputs_II.to(device), outputs_OO)


def _deflated(root_NN: Tensor, factors_NR: Tensor, damping: float) -> Tensor:
    """Return L (I - V V^T) L^T with damping; the columns of V are an orthonormal basis of those of L^T factors."""
    span_NR = torch.linalg.qr(root_NN.mT @ factors_NR)[0]
    seen_NR = root_NN @ span_NR
    moment_NN = torch.addmm(root_NN @ root_NN.mT, seen_NR, seen_NR.mT, alpha=-1)
    moment_NN.diagonal().add_(damping)  # the mean of the diagonal of L L^T is about 1
    return moment_NN


def _root(moment_NN: Tensor, share: float) -> Tensor:
    """Return the Cholesky factor of a moment, scaled and with damping; more damping where numbers are too far apart."""
    mean = _mean(moment_NN)
    if mean <= 0:
        return torch.eye(len(moment_NN), device=moment_NN.device)
    while True:
        damped_NN = moment_NN / mean
        damped_NN.diagonal().add_(share)
        root_NN, info = torch.linalg.cholesky_ex(damped_NN)
        if int(info) == 0:
            return root_NN
        share *= MORE_DAMPING
        assert share < MOST_DAMPING, "a matrix with a large diagonal has a factor"


def _mean(moment_NN: Tensor) -> float:
    return float(moment_NN.diagonal().double().mean())


def _problem(moment: Tensor | None) -> str:
    """Describe what is wrong with a moment; empty if nothing is."""
    if moment is None:
        return ""
    if moment.ndim != 2 or moment.shape[0] != moment.shape[1] or moment.dtype != torch.float32:
        return f"is {moment.dtype} {tuple(moment.shape)}, not a square float32 matrix"
    bad = int((~torch.isfinite(moment)).sum())
    return f"has {bad} of {moment.numel()} values that are NaN or infinite" if bad else ""
