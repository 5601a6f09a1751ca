"""Fit W ~ Q + B A by alternation: quantize what the factors leave, fit the factors to what the quantizer leaves.

QPiSSA (arXiv:2404.02948, section 4.2), LoftQ (arXiv:2310.08659, algorithm 1) and LQ-LoRA (arXiv:2311.12023, algorithm
2) are orders and lengths of this one loop. Unlike theirs it returns the best iterate, measured as it will be stored.
With an objective that weights rows and columns, as LQ-LoRA's Fisher information does, the loop goes on from the plain
split: every fit of the factors is then of the scaled matrix and scaled back, and "best" and "rise" mean the weighted
error. The quantizer stays as it is, so that a loop of weighted fits alone can end above the plain split; this cannot.

Shape suffixes: O = out features, I = in features, R = rank, K = sketch columns.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import sqrt
from typing import Literal

import torch
from torch import Tensor

from qsvd.decompose.objective import PLAIN, Objective
from qsvd.decompose.split import Split
from qsvd.errors import BadInput
from qsvd.numerics import norms, svd
from qsvd.numerics.codec import Codec, PackedBlocks

FIRST_PASSES = 5  # over W, from a random sketch: within 0.1 % of the error that full SVDs lead to
LATER_PASSES = 1  # over W - Q, from the subspace of the iteration before
ROWS = 1024  # measured at a time


@dataclass(frozen=True)
class Recipe:
    """How to fit a Split.

    Args:
        codec: The quantizer that is fitted, measured and saved.
        rank: Principal components; 0 is plain quantization (QLoRA).
        iterations: Passes of the loop, at least 1.
        order: Which comes first. "svd" starts from the factors of W itself (QPiSSA), "quantize" from codec(W) (LoftQ).
        end: What each pass ends with. "svd" fits the factors to the quantization error of the same pass;
            "quantize" keeps the factors that the residual was made with (QPiSSA's own ending).
        stop: "rise" ends the loop when the error grows, "never" runs all iterations.
        exact: Full SVDs instead of randomized ones.
        dtype: Of the stored factors.
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
        for name, allowed in (
            ("order", ("svd", "quantize")),
            ("end", ("svd", "quantize")),
            ("stop", ("rise", "never")),
        ):
            if getattr(self, name) not in allowed:
                raise BadInput(f"{name} {getattr(self, name)!r} is none of {', '.join(allowed)}")
        if self.rank < 0:
            raise BadInput(f"rank {self.rank} is negative; 0 is plain quantization, more adds principal components")
        if self.iterations < 1:
            raise BadInput(f"{self.iterations} iterations leave nothing to store; at least 1 is needed")
        if self.order == "quantize" and self.end == "quantize" and self.iterations == 1 and self.rank > 0:
            raise BadInput(
                "order 'quantize' with end 'quantize' needs at least 2 iterations: after 1 the factors are still zero"
            )


@dataclass(frozen=True)
class _Task:
    """A recipe, what it is to minimise, and the draws it takes."""

    recipe: Recipe
    objective: Objective
    generator: torch.Generator


def split_weight(weight_OI: Tensor, recipe: Recipe, *, seed: int = 0, objective: Objective = PLAIN) -> Split:
    """The best split of one weight that the recipe finds.

    Args:
        weight_OI: float32, bfloat16 or float16 [O, I], finite; the work is done in float32 on its device.
        recipe: How to fit.
        seed: Of the random sketch; the same seed gives the same bytes on the same machine.
        objective: What counts as an error, on any device; `history` is in its norm, and where it is not plain begins
            with the plain split. Multiplied by a power of two it gives the same bytes.

    Raises:
        BadInput: weight_OI has another dtype or number of dimensions, or holds a NaN or an infinity (how many), or
            the rank is above min(O, I), or the objective is one of a matrix of another shape.
    """
    if weight_OI.ndim != 2 or weight_OI.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise BadInput(
            f"a float32, bfloat16 or float16 matrix can be split, not {weight_OI.dtype} {tuple(weight_OI.shape)}"
        )
    limit = min(weight_OI.shape)
    if recipe.rank > limit:
        raise BadInput(f"rank {recipe.rank} is outside 0..{limit}, the ranks of a {tuple(weight_OI.shape)} matrix")
    objective.check_fits(tuple(weight_OI.shape))
    weight_OI = weight_OI.float().contiguous()
    if not torch.isfinite(weight_OI.sum()):  # one pass finds nearly all; the count below decides
        num_bad = int((~torch.isfinite(weight_OI)).sum())
        if num_bad:
            raise BadInput(f"{num_bad} of {weight_OI.numel()} values are NaN or infinite")
    generator = torch.Generator(weight_OI.device).manual_seed(seed)
    plain = _best(weight_OI, _Task(recipe, PLAIN, generator), None)
    if objective.is_plain:
        return plain
    return _best(weight_OI, _Task(recipe, objective.to(weight_OI.device), generator), plain)


def _best(weight_OI: Tensor, task: _Task, start: Split | None) -> Split:
    """The best of what the loop makes, from nothing or from an earlier split, which is then the first of them."""
    best: Split | None = None
    history: list[float] = []
    for packed, up_OR, down_RI, left_over_OI in _iterates(weight_OI, task, start):
        history.append(_distance(left_over_OI, up_OR, down_RI, task.objective))
        if best is None or history[-1] < min(history[:-1]):
            best = Split(packed, up_OR, down_RI, len(history), ())
        elif task.recipe.stop == "rise" and history[-1] > history[-2]:
            break
    assert best is not None, "a recipe has at least one iteration"
    return replace(best, history=tuple(history))


def _iterates(
    weight_OI: Tensor, task: _Task, start: Split | None
) -> Iterator[tuple[PackedBlocks, Tensor, Tensor, Tensor]]:
    """Residual, up, down and W - Q of each pass; W - Q lies in a buffer that the next pass overwrites."""
    recipe, work_OI = task.recipe, torch.empty_like(weight_OI)
    if start is None:
        top = _fit(weight_OI, task, None) if recipe.order == "svd" else None
    else:
        torch.sub(weight_OI, start.residual.decode(out=work_OI), out=work_OI)
        yield start.residual, start.up_OR, start.down_RI, work_OI
        top = _fit(work_OI, task, _subspace(start, task))
        if recipe.end == "svd" and recipe.rank > 0:
            yield start.residual, *_factors(top, weight_OI, task), work_OI
    for number in range(1, _passes(recipe, start) + 1):
        up_OR, down_RI = _factors(top, weight_OI, task)
        torch.addmm(weight_OI, up_OR.float(), down_RI.float(), alpha=-1, out=work_OI)
        packed = recipe.codec.encode(work_OI)
        torch.sub(weight_OI, packed.decode(out=work_OI), out=work_OI)
        if recipe.end == "svd":
            top = _fit(work_OI, task, None if top is None else top.right_KI)
            up_OR, down_RI = _factors(top, weight_OI, task)
        yield packed, up_OR, down_RI, work_OI
        if recipe.end == "quantize" and number < recipe.iterations:
            top = _fit(work_OI, task, None if top is None else top.right_KI)


def _passes(recipe: Recipe, start: Split | None) -> int:
    if recipe.rank > 0:
        return recipe.iterations
    return 1 if start is None else 0  # without factors every pass would be the same


def _fit(matrix_OI: Tensor, task: _Task, start_KI: Tensor | None) -> svd.TopSVD | None:
    """Of the matrix as the objective scales it; from a subspace of its rows, if one is known."""
    recipe = task.recipe
    if recipe.rank == 0:
        return None
    scaled_OI = task.objective.scaled(matrix_OI)
    if recipe.exact:
        return svd.exact_svd(scaled_OI, recipe.rank)
    passes = FIRST_PASSES if start_KI is None else LATER_PASSES
    return svd.randomized_svd(scaled_OI, recipe.rank, passes=passes, generator=task.generator, start_KI=start_KI)


def _subspace(start: Split, task: _Task) -> Tensor:
    """Rows [K, I] that span those of the split's factors, scaled: a fit from there is no worse than these factors."""
    down_RI = task.objective.scaled_columns(start.down_RI.float())
    shape, device = (svd.OVERSAMPLE, down_RI.shape[1]), down_RI.device
    return torch.cat((down_RI, torch.randn(shape, generator=task.generator, device=device)))


def _factors(top: svd.TopSVD | None, weight_OI: Tensor, task: _Task) -> tuple[Tensor, Tensor]:
    """The factors as they will be stored: up [O, R] and down [R, I]; zeros before the first fit."""
    rank, dtype = task.recipe.rank, task.recipe.dtype
    if top is None:
        rows, columns = weight_OI.shape
        return weight_OI.new_zeros(rows, rank, dtype=dtype), weight_OI.new_zeros(rank, columns, dtype=dtype)
    if task.objective.is_plain:
        return top.factors(rank, dtype)
    return _scaled_back(top, task)


def _scaled_back(top: svd.TopSVD, task: _Task) -> tuple[Tensor, Tensor]:
    """diag(rows)^-1 U and V^T diag(columns)^-1, each component with S shared so that both its halves are as long.

    Training starts from balanced factors (PiSSA, eq. 2-3), and so the unit of the weights leaves no trace.
    """
    rank, dtype = task.recipe.rank, task.recipe.dtype
    up_OR, down_RI = task.objective.unscaled(top.left_OK[:, :rank], top.right_KI[:rank])
    up_R, down_R = (torch.linalg.vector_norm(one, dim=dim) for one, dim in ((up_OR, 0), (down_RI, 1)))
    lengths_R = (top.values_K[:rank] * up_R * down_R).sqrt()  # of either half
    return (up_OR * (lengths_R / up_R)).to(dtype), (down_RI * (lengths_R / down_R)[:, None]).to(dtype)


def _distance(left_over_OI: Tensor, up_OR: Tensor, down_RI: Tensor, objective: Objective) -> float:
    """|| diag(rows) (E - up down) diag(columns) ||_F, a few rows at a time."""
    down_RI = down_RI.float()
    squares = 0.0
    for start in range(0, left_over_OI.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        error_OI = torch.addmm(left_over_OI[rows], up_OR[rows].float(), down_RI, alpha=-1)
        squares += norms.frobenius(objective.of_rows(rows).scaled(error_OI)) ** 2
    return sqrt(squares)
