"""Norms of an error matrix: Frobenius and spectral, and nuclear as in the PiSSA paper (arXiv:2404.02948, section 4).

Small matrices are measured exactly. For large ones the nuclear norm tr sqrt(E E^T) comes from stochastic Lanczos
quadrature (Ubaru, Chen and Saad, 2017): each random probe gives an unbiased estimate from a few products with E.

Shape suffixes: N = matrices of a stack, S, L = the shorter and the longer side, P = probes, K = Lanczos steps.
"""

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor

from qsvd.records import Norms

EXACT_SIDE = 1024  # longest shorter side whose Gram matrix is decomposed: under half a second on two cores
STEPS = (8, 16, 32, 64)  # of Lanczos, after which the estimate is checked; noise ends at 16, steep spectra at 64
CLOSE = 0.003  # relative change over a doubling of the steps; the error that remains is about a third of it
ENDED = 1e-5  # a step this short relative to the spectrum is float32 roundoff: the probe has no further direction
NOISE = 1e-6  # nodes this far below the largest are float32 roundoff, which the square root would magnify
LEAST, MOST = 1e-15, 1e18  # lengths of rows whose squares float32 holds
PROBES = 16  # in one batch
MOST_BATCHES = 16
CLOSE_ENOUGH = 0.006  # relative standard error at which no further batch is drawn; three of them are less than 2 %


def frobenius(matrix: Tensor) -> float:
    """Return ||matrix||_F of a float32 matrix; rows are summed in float32, and their sums in float64."""
    return float(squares(matrix).sqrt())


def squares(matrix: Tensor) -> Tensor:
    """Return the squared Frobenius norms of float32 matrices [..., O, I], in float64."""
    lengths = torch.linalg.vector_norm(matrix, dim=-1)
    if lengths.numel() and not (float(lengths.min()) > LEAST and float(lengths.max()) < MOST):
        lengths = torch.linalg.vector_norm(matrix, dim=-1, dtype=torch.float64)  # float32 has no such squares
    return lengths.double().square().sum(dim=-1)


def norms(error_OI: Tensor, generator: torch.Generator) -> Norms:
    """Return all norms of a float32 [O, I] matrix; see `norms_of`."""
    return norms_of(error_OI[None], (generator,))[0]


def norms_of(errors_NOI: Tensor, generators: Sequence[torch.Generator]) -> list[Norms]:
    """Return all norms of each matrix of a float32 stack.

    With a shorter side of at most EXACT_SIDE they are exact (to the square root of float64's precision). Above it the
    nuclear norm is an estimate with its standard error, and the spectral norm is the largest Ritz value, a lower bound.
    """
    short_NSL = errors_NOI if errors_NOI.shape[1] <= errors_NOI.shape[2] else errors_NOI.mT
    if min(errors_NOI.shape) == 0:
        return [Norms(0.0, 0.0, 0.0, 0.0)] * len(errors_NOI)
    if short_NSL.shape[1] <= EXACT_SIDE:
        return _exact(short_NSL)
    whole = squares(errors_NOI).sqrt().tolist()
    return [_estimated(*one) for one in zip(short_NSL, whole, generators, strict=True)]


def _exact(short_NSL: Tensor) -> list[Norms]:
    count, side, _ = short_NSL.shape
    gram_NSS = torch.zeros(count, side, side, dtype=torch.float64, device=short_NSL.device)
    for columns in short_NSL.split(4096, dim=2):  # a float64 copy of a few columns at a time
        part = columns.double()
        gram_NSS.baddbmm_(part, part.mT)
    values_NS = torch.linalg.eigvalsh(gram_NSS).clamp_(min=0).sqrt_()
    found_N3 = torch.stack((values_NS.square().sum(dim=1).sqrt(), values_NS.sum(dim=1), values_NS[:, -1]), dim=1)
    return [Norms(frobenius, nuclear, 0.0, spectral) for frobenius, nuclear, spectral in found_N3.tolist()]


def _estimated(short_SL: Tensor, frobenius_norm: float, generator: torch.Generator) -> Norms:
    samples_N = torch.empty(0, dtype=torch.float64)
    spectral, standard_error = 0.0, float("inf")
    for _ in range(MOST_BATCHES):
        samples_P, largest = _probe(short_SL, generator)
        samples_N = torch.cat((samples_N, samples_P))
        spectral = max(spectral, largest)
        standard_error = float(samples_N.std()) / sqrt(samples_N.numel())
        if standard_error <= CLOSE_ENOUGH * float(samples_N.mean()):
            break
    return Norms(frobenius_norm, float(samples_N.mean()), standard_error, spectral)


def _probe(short_SL: Tensor, generator: torch.Generator) -> tuple[Tensor, float]:
    """Return the nuclear norm estimated by each of PROBES random vectors, float64 [P], and the largest singular value.

    A Lanczos recurrence on E E^T runs for all probes at once, fully orthogonalized, in float32. It ends early when
    twice the steps changed the mean by less than CLOSE: Gauss quadrature of a square root falls to the exact value.
    """
    side, device = short_SL.shape[0], short_SL.device
    basis_PKS = torch.zeros(PROBES, max(STEPS), side, device=device)
    diagonal_PK, next_PK = torch.zeros(2, PROBES, max(STEPS), dtype=torch.float64, device=device)
    signs_PS = torch.randint(0, 2, (PROBES, side), generator=generator, device=device)
    vector_PS = (2.0 * signs_PS - 1.0) / sqrt(side)
    samples_P, largest, earlier = torch.empty(0), 0.0, float("inf")
    for step in range(max(STEPS)):
        basis_PKS[:, step] = vector_PS
        vector_PS = (vector_PS @ short_SL) @ short_SL.mT
        diagonal_PK[:, step] = (vector_PS * basis_PKS[:, step]).sum(dim=1)
        vector_PS = _orthogonal(vector_PS, basis_PKS[:, : step + 1])
        length_P1 = torch.linalg.vector_norm(vector_PS, dim=1, keepdim=True)
        goes_on_P1 = length_P1 > ENDED * diagonal_PK[:, : step + 1].amax(dim=1, keepdim=True)
        next_PK[:, step] = torch.where(goes_on_P1, length_P1, 0)[:, 0]
        vector_PS = torch.where(goes_on_P1, vector_PS / length_P1, 0)  # later nodes are 0 and have weight 0
        if step + 1 in STEPS:
            samples_P, largest = _quadrature(diagonal_PK[:, : step + 1], next_PK[:, :step], side)
            mean = float(samples_P.mean())
            if earlier - mean <= CLOSE * mean:
                break
            earlier = mean
    return samples_P, largest


def _orthogonal(vector_PS: Tensor, basis_PKS: Tensor) -> Tensor:
    """Return the part of each vector orthogonal to its basis; two rounds are enough (Parlett)."""
    for _ in range(2):
        along_PK1 = basis_PKS @ vector_PS[:, :, None]
        vector_PS = vector_PS - (along_PK1.mT @ basis_PKS)[:, 0]
    return vector_PS


def _quadrature(diagonal_PK: Tensor, next_PK: Tensor, side: int) -> tuple[Tensor, float]:
    """Return side times the quadrature of the square root, float64 [P], and the root of the largest node."""
    off_diagonal = torch.diag_embed(next_PK, offset=1)
    nodes_PK, vectors_PKK = torch.linalg.eigh(torch.diag_embed(diagonal_PK) + off_diagonal + off_diagonal.mT)
    noise = NOISE * nodes_PK.amax(dim=1, keepdim=True)
    roots_PK = torch.where(nodes_PK > noise, nodes_PK, 0).sqrt()
    return side * (vectors_PKK[:, 0].square() * roots_PK).sum(dim=1).cpu(), float(roots_PK.max())
