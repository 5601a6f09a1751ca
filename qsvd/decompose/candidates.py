"""Measure the candidates of one weight: the error of its split at each codec and each rank.

LQ-LoRA (arXiv:2311.12023, section 3.2) measures the error of every bit width after the low-rank fit, by whole
decompositions. Here one SVD of the weight starts all ranks, each candidate makes PASSES short passes of the loop of
alternate.py, and the gain of the passes after them is extrapolated. On the weights of three small models, at ranks up
to an eighth of the shorter side, the whole loop ends with a squared error of 0.89 to 1.06 times the extrapolated one at
2 bits, 0.98 to 1.03 at 3 and 4 bits, and 0.81 to 1.00 at 8 bits (nine in ten). After one pass alone these ratios are
0.83 to 0.98, 0.74 to 0.98 and 0.44 to 0.97, and smaller at higher ranks, which would be chosen too rarely.

Shape suffixes: O = out features, I = in features, R = rank, K = sketch columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qsvd.decompose.alternate import FIRST_PASSES, check_finite
from qsvd.decompose.objective import PLAIN, Objective
from qsvd.errors import BadInput
from qsvd.numerics import norms, svd
from qsvd.numerics.codec import Codec

PASSES = 2  # of each candidate; a third one changes the cost of the chosen candidates by a percent at most
ROWS = 256  # measured at a time


@dataclass(frozen=True)
class CandidateErrors:
    """Errors of the candidates of one weight, in the norm of an objective.

    Args:
        ranks: Rising.
        squares: squares[n][c] is the expected squared error of a split with ranks[n] and codec number c.
        norm: ||W||^2; an error over it is relative.
        values: The leading singular values of W, as many as the highest rank.
        nuclear: Sum of all singular values of W; estimated for a large W.
    """

    ranks: tuple[int, ...]
    squares: tuple[tuple[float, ...], ...]
    norm: float
    values: tuple[float, ...]
    nuclear: float


@dataclass(frozen=True)
class _Weight:
    """What all candidates of W share; `work_OI` is overwritten."""

    weight_OI: Tensor
    work_OI: Tensor
    objective: Objective
    dtype: torch.dtype


def measure_candidates(
    weight_OI: Tensor,
    codecs: Sequence[Codec],
    ranks: Sequence[int],
    *,
    objective: Objective = PLAIN,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> CandidateErrors:
    """Return the errors of every codec at every rank; it holds at most three more float32 matrices of the same size.

    Args:
        weight_OI: float32, bfloat16 or float16 [O, I], finite; the work is done in float32 on its device.
        codecs: Any number of codecs.
        ranks: Rising, 0..min(O, I); 0 is the codec alone.
        objective: How errors are weighted, on any device.
        dtype: Dtype of the stored factors.
        seed: Seed of the random sketch and of the probes of a nuclear norm.

    Raises:
        BadInput: weight_OI holds NaNs or infinities (how many); ranks are empty or do not fit it; or the objective
            belongs to another shape.
    """
    limit = min(weight_OI.shape)
    if not ranks or list(ranks) != sorted({*ranks}) or not 0 <= ranks[0] <= ranks[-1] <= limit:
        raise BadInput(f"ranks {list(ranks)} are not rising within 0..{limit}, those of a {tuple(weight_OI.shape)}")
    objective.check_fits(tuple(weight_OI.shape))
    check_finite(weight_OI)
    generator = torch.Generator(weight_OI.device).manual_seed(seed)
    weight_OI, objective = weight_OI.float().contiguous(), objective.to(weight_OI.device)
    scaled_OI = objective.scaled(weight_OI)
    norm = norms.frobenius(scaled_OI) ** 2
    top, nuclear = _spectrum(scaled_OI, ranks[-1], generator)
    del scaled_OI
    weight = _Weight(weight_OI, torch.empty_like(weight_OI), objective, dtype)
    target_OI = torch.empty_like(weight_OI)
    squares = []
    for rank in ranks:
        up_OR, down_RI = _stored(weight, top.left_OK[:, :rank] * top.values_K[:rank], top.right_KI[:rank])
        torch.addmm(weight_OI, up_OR, down_RI, alpha=-1, out=target_OI)
        squares.append(tuple(_square_of(weight, codec, target_OI, top.right_KI[:rank].mT) for codec in codecs))
    return CandidateErrors(tuple(ranks), tuple(squares), norm, tuple(top.values_K[: ranks[-1]].tolist()), nuclear)


def _spectrum(scaled_OI: Tensor, rank: int, generator: torch.Generator) -> tuple[svd.TopSVD, float]:
    """Return the leading singular triples and the sum of all singular values."""
    if rank == 0:
        (rows, columns), new = scaled_OI.shape, scaled_OI.new_empty
        return svd.TopSVD(new(rows, 0), new(0), new(0, columns)), norms.norms(scaled_OI, generator).nuclear
    if min(scaled_OI.shape) <= svd.SMALL:
        top = svd.exact_svd(scaled_OI, min(scaled_OI.shape))
        return top, float(top.values_K.double().sum())
    top = svd.randomized_svd(scaled_OI, rank, passes=FIRST_PASSES, generator=generator)
    return top, norms.norms(scaled_OI, generator).nuclear


def _square_of(weight: _Weight, codec: Codec, target_OI: Tensor, basis_IR: Tensor) -> float:
    """Return the expected squared error: each pass quantizes the target, and fits the factors to what is left.

    Args:
        target_OI: W - B A.
        basis_IR: The start of the first fit.
    """
    squares = []
    for _ in range(PASSES):
        codec.encode(target_OI).decode(out=weight.work_OI)
        torch.sub(weight.weight_OI, weight.work_OI, out=weight.work_OI)  # W - Q
        if basis_IR.shape[1] == 0:
            return _square(weight)
        up_OR, down_RI, basis_IR = _refitted(weight, basis_IR)
        weight.work_OI.addmm_(up_OR, down_RI, alpha=-1)
        squares.append(_square(weight))
        if len(squares) < PASSES:
            target_OI = torch.addmm(weight.weight_OI, up_OR, down_RI, alpha=-1, out=weight.work_OI)
    *_, before, last = squares
    # later passes gain in all about as much as the last one
    return min(before, last) if last >= before else last * (last / before)


def _refitted(weight: _Weight, basis_IR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return factors of `work_OI` as they are stored, by one half-step of subspace iteration, and the next basis.

    The matrix to decompose is diag(rows) M diag(columns); the thin matrices are scaled, so that M is not copied.
    """
    rows, columns = weight.objective.rows_O, weight.objective.columns_I
    left_OR = svd.orthonormal(_times(rows, weight.work_OI @ _times(columns, basis_IR)))
    right_IR = _times(columns, weight.work_OI.mT @ _times(rows, left_OR))
    up_OR, down_RI = _stored(weight, left_OR, right_IR.mT)
    return up_OR, down_RI, svd.orthonormal(right_IR)


def _times(weights_N: Tensor | None, tall_NR: Tensor) -> Tensor:
    """Return diag(weights) tall."""
    return tall_NR if weights_N is None else tall_NR * weights_N[:, None]


def _stored(weight: _Weight, left_OR: Tensor, right_RI: Tensor) -> tuple[Tensor, Tensor]:
    """Turn factors of the scaled matrix into factors of the matrix, rounded as they will be stored, in float32."""
    up_OR, down_RI = weight.objective.unscaled(left_OR, right_RI)
    return up_OR.to(weight.dtype).float(), down_RI.to(weight.dtype).float()


def _square(weight: _Weight) -> float:
    """Return the squared norm of `work_OI` by the objective, computed for a few rows at a time."""
    parts = (slice(start, start + ROWS) for start in range(0, weight.work_OI.shape[0], ROWS))
    return sum(norms.frobenius(weight.objective.of_rows(rows).scaled(weight.work_OI[rows])) ** 2 for rows in parts)
