"""Fit W ~ Q + B A by alternation: quantize what the factors leave, fit the factors to what the quantizer leaves.

QPiSSA (arXiv:2404.02948, section 4.2), LoftQ (arXiv:2310.08659, algorithm 1) and LQ-LoRA (arXiv:2311.12023, algorithm
2) are orders and lengths of this one loop. Unlike theirs it returns the best iterate, measured as it will be stored.

Shape suffixes: O = out features, I = in features, R = rank, K = sketch columns.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import sqrt
from typing import Literal

import torch
from torch import Tensor

from qsvd.decompose.split import Split
from qsvd.numerics import error, svd
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
                raise ValueError(f"{name} {getattr(self, name)!r} is none of {', '.join(allowed)}")
        if self.rank < 0:
            raise ValueError(f"rank {self.rank} is negative; 0 is plain quantization, more adds principal components")
        if self.iterations < 1:
            raise ValueError(f"{self.iterations} iterations leave nothing to store; at least 1 is needed")
        if self.order == "quantize" and self.end == "quantize" and self.iterations == 1 and self.rank > 0:
            raise ValueError(
                "order 'quantize' with end 'quantize' needs at least 2 iterations: after 1 the factors are still zero"
            )


def split_weight(weight_OI: Tensor, recipe: Recipe, *, seed: int = 0) -> Split:
    """The best split of one weight that the recipe finds.

    Args:
        weight_OI: float32, bfloat16 or float16 [O, I], finite; the work is done in float32 on its device.
        recipe: How to fit.
        seed: Of the random sketch; the same seed gives the same bytes on the same machine.

    Raises:
        ValueError: weight_OI has another dtype or number of dimensions, or holds a NaN or an infinity (how many), or
            the rank is above min(O, I).
    """
    if weight_OI.ndim != 2 or weight_OI.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"a float32, bfloat16 or float16 matrix can be split, not {weight_OI.dtype} {tuple(weight_OI.shape)}"
        )
    limit = min(weight_OI.shape)
    if recipe.rank > limit:
        raise ValueError(f"rank {recipe.rank} is outside 0..{limit}, the ranks of a {tuple(weight_OI.shape)} matrix")
    weight_OI = weight_OI.float().contiguous()
    if not torch.isfinite(weight_OI.sum()):  # one pass finds nearly all; the count below decides
        num_bad = int((~torch.isfinite(weight_OI)).sum())
        if num_bad:
            raise ValueError(f"{num_bad} of {weight_OI.numel()} values are NaN or infinite")
    generator = torch.Generator(weight_OI.device).manual_seed(seed)
    best: Split | None = None
    history: list[float] = []
    for packed, up_OR, down_RI, left_over_OI in _iterates(weight_OI, recipe, generator):
        history.append(_distance(left_over_OI, up_OR, down_RI))
        if best is None or history[-1] < min(history[:-1]):
            best = Split(packed, up_OR, down_RI, len(history), ())
        elif recipe.stop == "rise" and history[-1] > history[-2]:
            break
    assert best is not None, "a recipe has at least one iteration"
    return replace(best, history=tuple(history))


def _iterates(
    weight_OI: Tensor, recipe: Recipe, generator: torch.Generator
) -> Iterator[tuple[PackedBlocks, Tensor, Tensor, Tensor]]:
    """Residual, up, down and W - Q of each pass; W - Q lies in a buffer that the next pass overwrites."""
    work_OI = torch.empty_like(weight_OI)
    top = _fit(weight_OI, recipe, generator, None) if recipe.order == "svd" else None
    for number in range(1, _passes(recipe) + 1):
        up_OR, down_RI = _factors(top, weight_OI, recipe)
        torch.addmm(weight_OI, up_OR.float(), down_RI.float(), alpha=-1, out=work_OI)
        packed = recipe.codec.encode(work_OI)
        torch.sub(weight_OI, packed.decode(out=work_OI), out=work_OI)
        if recipe.end == "svd":
            top = _fit(work_OI, recipe, generator, top)
            up_OR, down_RI = _factors(top, weight_OI, recipe)
        yield packed, up_OR, down_RI, work_OI
        if recipe.end == "quantize" and number < recipe.iterations:
            top = _fit(work_OI, recipe, generator, top)


def _passes(recipe: Recipe) -> int:
    return recipe.iterations if recipe.rank > 0 else 1  # without factors every pass would be the same


def _fit(
    matrix_OI: Tensor, recipe: Recipe, generator: torch.Generator, earlier: svd.TopSVD | None
) -> svd.TopSVD | None:
    if recipe.rank == 0:
        return None
    if recipe.exact:
        return svd.exact_svd(matrix_OI, recipe.rank)
    start_KI, passes = (earlier.right_KI, LATER_PASSES) if earlier else (None, FIRST_PASSES)
    return svd.randomized_svd(matrix_OI, recipe.rank, passes=passes, generator=generator, start_KI=start_KI)


def _factors(top: svd.TopSVD | None, weight_OI: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """The factors as they will be stored: up [O, R] and down [R, I]; zeros before the first fit."""
    if top is not None:
        return top.factors(recipe.rank, recipe.dtype)
    rows, columns = weight_OI.shape
    return weight_OI.new_zeros(rows, recipe.rank, dtype=recipe.dtype), weight_OI.new_zeros(
        recipe.rank, columns, dtype=recipe.dtype
    )


def _distance(left_over_OI: Tensor, up_OR: Tensor, down_RI: Tensor) -> float:
    """||E - up down||_F, a few rows at a time."""
    down_RI = down_RI.float()
    squares = 0.0
    for start in range(0, left_over_OI.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        squares += error.frobenius(torch.addmm(left_over_OI[rows], up_OR[rows].float(), down_RI, alpha=-1)) ** 2
    return sqrt(squares)
