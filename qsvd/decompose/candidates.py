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
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qsvd.decompose.alternate import FIRST_PASSES, Recipe, check_finite, split_weight
from qsvd.decompose.moments import Moments
from qsvd.decompose.objective import PLAIN, Objective
from qsvd.decompose.rounding import round_nearest
from qsvd.errors import BadInput
from qsvd.numerics import norms, svd
from qsvd.numerics.codec import Codec

ROWS = 256  # measured at a time
PASSES = 2  # of each candidate; a third one changes the cost of the chosen candidates by a percent at most


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
    objective: Objective | Moments
    dtype: torch.dtype
    scales: str


def measure_candidates(
    weight_OI: Tensor,
    codecs: Sequence[Codec],
    ranks: Sequence[int],
    *,
    objective: Objective | Moments = PLAIN,
    like: Recipe | None = None,
    seed: int = 0,
) -> CandidateErrors:
    """Return the errors of every codec at every rank; it holds at most three more float32 matrices of the same size.

    Args:
        weight_OI: float32, bfloat16 or float16 [O, I], finite; the work is done in float32 on its device.
        codecs: Any number of codecs.
        ranks: Rising, 0..min(O, I); 0 is the codec alone.
        objective: How errors are weighted, on any device.
        like: Dtype of the stored factors, scales and rounding; None has those of a Recipe by default. With feedback,
            the lowest and the highest rank of each codec are split as they would be; errors of the ranks between are
            those of nearest codes, times the ratio of both, interpolated.
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
    norm, top, nuclear = _spectrum(objective.scaled(weight_OI), ranks[-1], generator)
    like = like or Recipe(codecs[0], 0)
    weight = _Weight(weight_OI, torch.empty_like(weight_OI), objective, like.dtype, like.scales)
    target_OI = torch.empty_like(weight_OI)
    squares = []
    for rank in ranks:
        up_OR, down_RI = _stored(weight, top.left_OK[:, :rank] * top.values_K[:rank], top.right_KI[:rank])
        torch.addmm(weight_OI, up_OR, down_RI, alpha=-1, out=target_OI)
        squares.append(tuple(_square_of(weight, codec, target_OI, top.right_KI[:rank].mT) for codec in codecs))
    if like.rounding == "feedback":
        squares = _fed_back(weight, [replace(like, codec=codec) for codec in codecs], ranks, squares, seed)
    return CandidateErrors(tuple(ranks), tuple(squares), norm, tuple(top.values_K[: ranks[-1]].tolist()), nuclear)


def _fed_back(
    weight: _Weight, recipes: Sequence[Recipe], ranks: Sequence[int], squares: list[tuple[float, ...]], seed: int
) -> list[tuple[float, ...]]:
    """Return the errors with feedback; see `measure_candidates`."""
    found = []
    for number, recipe in enumerate(recipes):
        ratios = []
        for rank, nearest in ((ranks[0], squares[0][number]), (ranks[-1], squares[-1][number])):
            one = replace(recipe, rank=rank, iterations=1)
            split = split_weight(weight.weight_OI, one, seed=seed, objective=weight.objective)
            ratios.append(min(split.history) ** 2 / nearest if nearest else 1.0)
        first, last = ratios
        places = [place / max(len(ranks) - 1, 1) for place in range(len(ranks))]
        found.append([each[number] * (first + (last - first) * at) for each, at in zip(squares, places, strict=True)])
    return list(zip(*found, strict=True))


def _spectrum(scaled: Tensor | svd.Product, rank: int, generator: torch.Generator) -> tuple[float, svd.TopSVD, float]:
    """Return the squared norm, the leading singular triples and the sum of all singular values."""
    scaled_OI = scaled.computed() if isinstance(scaled, svd.Product) else scaled
    norm = norms.frobenius(scaled_OI) ** 2
    if rank == 0:
        (rows, columns), new = scaled_OI.shape, scaled_OI.new_empty
        return norm, svd.TopSVD(new(rows, 0), new(0), new(0, columns)), norms.norms(scaled_OI, generator).nuclear
    if min(scaled_OI.shape) <= svd.SMALL:
        top = svd.exact_svd(scaled_OI, min(scaled_OI.shape))
        return norm, top, float(top.values_K.double().sum())
    top = svd.randomized_svd(scaled_OI, rank, passes=FIRST_PASSES, generator=generator)
    return norm, top, norms.norms(scaled_OI, generator).nuclear


def _square_of(weight: _Weight, codec: Codec, target_OI: Tensor, basis_IR: Tensor) -> float:
    """Return the expected squared error: each pass quantizes the target, and fits the factors to what is left.

    Args:
        target_OI: W - B A.
        basis_IR: The start of the first fit.
    """
    squares = []
    for _ in range(PASSES):
        packed = codec.encode(target_OI) if weight.scales == "absmax" else round_nearest(target_OI, codec)
        packed.decode(out=weight.work_OI)
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

    The scaled matrix is not computed: thin matrices are multiplied with its parts.
    """
    objective, work_OI = weight.objective, weight.work_OI
    if isinstance(objective, Moments):
        scaled_OI = objective.scaled(work_OI)
        left_OR = svd.orthonormal(scaled_OI @ basis_IR)
        right_IR = scaled_OI.mT @ left_OR
    else:
        rows, columns = objective.rows_O, objective.columns_I
        left_OR = svd.orthonormal(_times(rows, work_OI @ _times(columns, basis_IR)))
        right_IR = _times(columns, work_OI.mT @ _times(rows, left_OR))
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
    """Return the squared norm of `work_OI` by the objective, computed for a few rows at a time where rows are apart."""
    objective, work_OI = weight.objective, weight.work_OI
    if isinstance(objective, Moments):
        (rows, columns), new = work_OI.shape, work_OI.new_empty
        return float(objective.squares(work_OI[None], new(1, rows, 0), new(1, 0, columns)))
    parts = (slice(start, start + ROWS) for start in range(0, work_OI.shape[0], ROWS))
    return sum(norms.frobenius(objective.of_rows(rows).scaled(work_OI[rows])) ** 2 for rows in parts)
