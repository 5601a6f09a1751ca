"""Fit W ~ Q + B A by alternation: quantize what the factors leave, fit the factors to what the quantizer leaves.

    up, down = factors(svd(W))              # order="svd"; zeros for order="quantize"
    repeat:
        Q = codec(W - up @ down)
        up, down = factors(svd(W - Q))      # end="svd"; for end="quantize" only at the start of the next pass
        keep (Q, up, down) if ||W - Q - up @ down|| is the least so far
        stop if it rose                     # stop="rise"

QPiSSA (arXiv:2404.02948, section 4.2), LoftQ (arXiv:2310.08659, algorithm 1) and LQ-LoRA (arXiv:2311.12023, algorithm
2) are orders and lengths of this loop. Unlike theirs it returns the best iterate, measured as it will be stored.
examples/split_one_matrix.py shows its use.

An objective that weights rows and columns, such as LQ-LoRA's Fisher information, changes three things: the loop starts
from the plain split, every fit is of the scaled matrix and scaled back, and the error is the weighted one. The
quantizer ignores the weights, so that a loop of weighted fits alone can end with a larger weighted error than the plain
split. Starting from the plain split prevents that.

Shape suffixes: O = out features, I = in features, R = rank, K = sketch columns.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import sqrt
from typing import Literal

import torch
from torch import Tensor

from qsvd.decompose.objective import PLAIN, Objective
from qsvd.decompose.split import Split
from qsvd.errors import BadInput
from qsvd.numerics import norms, svd
from qsvd.numerics.codec import FLOATS, Codec, PackedBlocks

FIRST_PASSES = 5  # over W, from a random sketch: within 0.1 % of the error that full SVDs lead to
LATER_PASSES = 1  # over W - Q, from the subspace of the fit before
ROWS = 1024  # measured at a time


@dataclass(frozen=True)
class Recipe:
    """How to fit a Split.

    Args:
        codec: The quantizer that is fitted, measured and saved.
        rank: Principal components; 0 is plain quantization (QLoRA).
        iterations: Most passes of the loop, at least 1.
        order: What comes first. "svd" starts from the factors of W (QPiSSA), "quantize" from codec(W) (LoftQ).
        end: What each pass ends with. "svd" fits the factors to the quantization error of the same pass; "quantize"
            keeps the factors that the residual was made with (QPiSSA as published).
        stop: "rise" ends the loop when the error rises, "never" runs all iterations.
        exact: Use full SVDs instead of randomized ones.
        dtype: Dtype of the stored factors.

    Raises:
        BadInput: an argument has another value, or no pass would fit the factors.
    """

    codec: Codec
    rank: int
    iterations: int = 5
    order: Literal["svd", "quantize"] = "svd"
    end: Literal["svd", "quantize"] = "svd"
    stop: Literal["rise", "never"] = "rise"
    exact: bool = False
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self):
        either = ("svd", "quantize")
        for name, allowed in (("order", either), ("end", either), ("stop", ("rise", "never"))):
            if getattr(self, name) not in allowed:
                raise BadInput(f"{name} {getattr(self, name)!r} is not one of {', '.join(allowed)}")
        if self.rank < 0:
            raise BadInput(f"rank {self.rank} is negative; 0 is plain quantization, more adds principal components")
        if self.iterations < 1:
            raise BadInput(f"{self.iterations} iterations leave nothing to store; at least 1 is needed")
        if self.order == "quantize" and self.end == "quantize" and self.iterations == 1 and self.rank > 0:
            raise BadInput(
                "order 'quantize' with end 'quantize' needs at least 2 iterations: after 1 the factors are still zero"
            )


def split_weight(weight_OI: Tensor, recipe: Recipe, *, seed: int = 0, objective: Objective = PLAIN) -> Split:
    """Return the best split of one weight that the recipe finds.

    Args:
        weight_OI: float32, bfloat16 or float16 [O, I], finite; the work is done in float32 on its device.
        recipe: How to fit.
        seed: Seed of the random sketches; the same seed gives the same bytes on the same machine.
        objective: How errors are weighted, on any device. `history` is in its norm, and begins with the plain split if
            the objective is not plain. An objective times a power of two gives the same bytes.

    Raises:
        BadInput: weight_OI has another dtype or number of dimensions, or holds NaNs or infinities (how many); the rank
            is above min(O, I); or the objective belongs to another shape.
    """
    if weight_OI.ndim != 2 or weight_OI.dtype not in FLOATS:
        raise BadInput(
            f"a float32, bfloat16 or float16 matrix can be split, not {weight_OI.dtype} {tuple(weight_OI.shape)}"
        )
    limit = min(weight_OI.shape)
    if recipe.rank > limit:
        raise BadInput(f"rank {recipe.rank} is outside 0..{limit}, the ranks of a {tuple(weight_OI.shape)} matrix")
    objective.check_fits(tuple(weight_OI.shape))
    weight_OI = weight_OI.float().contiguous()
    check_finite(weight_OI)
    fitter = _Fitter(recipe, PLAIN, torch.Generator(weight_OI.device).manual_seed(seed))
    factors = fitter.fit(weight_OI) if recipe.order == "svd" else fitter.zeros(weight_OI)
    passes = recipe.iterations if recipe.rank > 0 else 1  # without factors every pass gives the same
    split = _best(_passes(weight_OI, fitter, factors, torch.empty_like(weight_OI), passes), fitter)
    if not objective.is_plain:
        fitter = replace(fitter, objective=objective.to(weight_OI.device))
        split = _best(_weighted_iterates(weight_OI, fitter, split), fitter)
    return split


def check_finite(weight_OI: Tensor) -> None:
    """Raise BadInput with the number of NaNs and infinities if there are any."""
    if not torch.isfinite(weight_OI.sum()):  # one cheap pass; finite numbers may overflow too, so that a count decides
        num_bad = int((~torch.isfinite(weight_OI)).sum())
        if num_bad:
            raise BadInput(f"{num_bad} of {weight_OI.numel()} values are NaN or infinite")


@dataclass(frozen=True)
class _Factors:
    """The factors as they will be stored, and the rows [K, I] whose span the next fit starts from, if there are any."""

    up_OR: Tensor
    down_RI: Tensor
    rows_KI: Tensor | None


_Iterate = tuple[PackedBlocks, _Factors, Tensor]  # Q, B and A, W - Q


def _weighted_iterates(weight_OI: Tensor, fitter: "_Fitter", plain: Split) -> Iterator[_Iterate]:
    """Yield the plain split, its residual with weighted factors, and then the iterates of the loop from there."""
    recipe = fitter.recipe
    left_OI = torch.empty_like(weight_OI)
    torch.sub(weight_OI, plain.residual.decode(out=left_OI), out=left_OI)
    # first, so that no worse split can be the best one
    yield plain.residual, _Factors(plain.up_OR, plain.down_RI, None), left_OI
    if recipe.rank > 0:  # without factors no fit can be weighted
        factors = fitter.fit(left_OI, fitter.subspace(plain.down_RI))
        if recipe.end == "svd":
            yield plain.residual, factors, left_OI
        yield from _passes(weight_OI, fitter, factors, left_OI, recipe.iterations)


def _passes(
    weight_OI: Tensor, fitter: "_Fitter", factors: _Factors, work_OI: Tensor, passes: int
) -> Iterator[_Iterate]:
    """Yield the iterate of every pass; W - Q is in `work_OI`, which the next pass overwrites."""
    recipe = fitter.recipe
    for number in range(passes):
        # end="quantize" keeps the factors that Q was made with, so that they are fitted again only before the next Q
        if recipe.end == "quantize" and number > 0:
            factors = fitter.fit(work_OI, factors.rows_KI)
        torch.addmm(weight_OI, factors.up_OR.float(), factors.down_RI.float(), alpha=-1, out=work_OI)
        residual = recipe.codec.encode(work_OI)
        torch.sub(weight_OI, residual.decode(out=work_OI), out=work_OI)  # W - Q, with Q as it is stored
        if recipe.end == "svd":
            factors = fitter.fit(work_OI, factors.rows_KI)
        yield residual, factors, work_OI


def _best(iterates: Iterable[_Iterate], fitter: "_Fitter") -> Split:
    """Return the iterate with the least error; with stop="rise", no iterate is made after an error that rose."""
    best: Split | None = None
    history: list[float] = []
    for residual, factors, left_OI in iterates:
        history.append(_distance(left_OI, factors, fitter.objective))
        # of equal errors the first is kept: a later one is not better
        if best is None or history[-1] < min(history[:-1]):
            best = Split(residual, factors.up_OR, factors.down_RI, len(history), ())
        elif fitter.recipe.stop == "rise" and history[-1] > history[-2]:
            break
    assert best is not None, "a recipe has at least one iteration"
    return replace(best, history=tuple(history))


def _distance(left_OI: Tensor, factors: _Factors, objective: Objective) -> float:
    """Return || diag(rows) (W - Q - up down) diag(columns) ||_F, computed for a few rows at a time."""
    down_RI = factors.down_RI.float()
    squares = 0.0
    for start in range(0, left_OI.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        error_OI = torch.addmm(left_OI[rows], factors.up_OR[rows].float(), down_RI, alpha=-1)
        squares += norms.frobenius(objective.of_rows(rows).scaled(error_OI)) ** 2
    return sqrt(squares)


@dataclass(frozen=True)
class _Fitter:
    """What every fit of a weight uses: the recipe, the weights of its errors, and the draws of random sketches."""

    recipe: Recipe
    objective: Objective
    generator: torch.Generator

    def zeros(self, weight_OI: Tensor) -> _Factors:
        """Return the factors before the first fit."""
        (rows, columns), rank, dtype = weight_OI.shape, self.recipe.rank, self.recipe.dtype
        return _Factors(
            weight_OI.new_zeros(rows, rank, dtype=dtype), weight_OI.new_zeros(rank, columns, dtype=dtype), None
        )

    def fit(self, matrix_OI: Tensor, start_KI: Tensor | None = None) -> _Factors:
        """Return the best factors of a matrix by the objective.

        Args:
            start_KI: Rows of an earlier fit; from there one pass is enough. None starts from a random sketch.
        """
        rank, dtype = self.recipe.rank, self.recipe.dtype
        if rank == 0:
            return self.zeros(matrix_OI)
        scaled_OI = self.objective.scaled(matrix_OI)
        if self.recipe.exact:
            top = svd.exact_svd(scaled_OI, rank)
        else:
            passes = FIRST_PASSES if start_KI is None else LATER_PASSES
            top = svd.randomized_svd(scaled_OI, rank, passes=passes, generator=self.generator, start_KI=start_KI)
        if self.objective.is_plain:
            return _Factors(*top.factors(rank, dtype), top.right_KI)
        # both halves get the same lengths: training starts from balanced factors (PiSSA, eq. 2-3), which do not depend
        # on the unit of the weights
        up_OR, down_RI = self.objective.unscaled(top.left_OK[:, :rank], top.right_KI[:rank])
        up_R, down_R = (torch.linalg.vector_norm(one, dim=dim) for one, dim in ((up_OR, 0), (down_RI, 1)))
        lengths_R = (top.values_K[:rank] * up_R * down_R).sqrt()  # of either half
        up_OR, down_RI = up_OR * (lengths_R / up_R), down_RI * (lengths_R / down_R)[:, None]
        return _Factors(up_OR.to(dtype), down_RI.to(dtype), top.right_KI)

    def subspace(self, down_RI: Tensor) -> Tensor:
        """Return rows [K, I] that span those of stored factors, scaled: a fit from there is at least as good."""
        scaled_RI = self.objective.scaled_columns(down_RI.float())
        shape, device = (svd.OVERSAMPLE, scaled_RI.shape[1]), scaled_RI.device
        return torch.cat((scaled_RI, torch.randn(shape, generator=self.generator, device=device)))
