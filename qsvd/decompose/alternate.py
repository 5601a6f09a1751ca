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

With scales="mse" the codec's scales are those of least squared error. With rounding="feedback" (rounding.py) the loop
goes on, and quantizes against what the factors will absorb; its best split by nearest codes stays the result if no
later one is better. With moments of inputs and gradients (moments.py) one plain pass comes first; its factors are
fitted in their norm, which is 8 % better than to start from the best factors of W in this norm.

Small matrices of one shape are split in stacks, so that a GPU is busy: each has its own draws, errors and last pass.

Shape suffixes: S = matrices of a stack, O = out features, I = in features, R = rank, K = sketch columns.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf, isnan
from typing import Literal

import torch
from torch import Tensor

from qsvd.decompose.moments import Moments
from qsvd.decompose.objective import PLAIN, Objective, stacked
from qsvd.decompose.rounding import DAMPING, round_nearest, round_with_feedback
from qsvd.decompose.split import Split
from qsvd.errors import BadInput
from qsvd.numerics import svd
from qsvd.numerics.codec import FLOATS, Codec, PackedBlocks

FIRST_PASSES = 5  # over W, from a random sketch: within 0.1 % of the error that full SVDs lead to
LATER_PASSES = 1  # over W - Q, from the subspace of the fit before
STACK = {"cpu": 1, "cuda": 1 << 26}  # elements of the largest stack: 256 MB of float32; on a CPU stacks are not faster


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
        scales: "absmax" takes the largest magnitude of each block, as the papers do, and bitsandbytes' bits; "mse" the
            scale of least squared error.
        rounding: "nearest", or "feedback", which has scales of its own, like "mse".
        sweeps: Of coordinate descent after each feedback.

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
    scales: Literal["absmax", "mse"] = "absmax"
    rounding: Literal["nearest", "feedback"] = "nearest"
    sweeps: int = 1

    def __post_init__(self):
        either = ("svd", "quantize")
        choices = {"order": either, "end": either, "stop": ("rise", "never")}
        for name, allowed in (choices | {"scales": ("absmax", "mse"), "rounding": ("nearest", "feedback")}).items():
            if getattr(self, name) not in allowed:
                raise BadInput(f"{name} {getattr(self, name)!r} is not one of {', '.join(allowed)}")
        if self.rank < 0:
            raise BadInput(f"rank {self.rank} is negative; 0 is plain quantization, more adds principal components")
        if self.iterations < 1:
            raise BadInput(f"{self.iterations} iterations leave nothing to store; at least 1 is needed")
        if self.sweeps < 1:
            raise BadInput(f"{self.sweeps} sweeps; at least 1 is needed")
        if self.order == "quantize" and self.end == "quantize" and self.iterations == 1 and self.rank > 0:
            raise BadInput(
                "order 'quantize' with end 'quantize' needs at least 2 iterations: after 1 the factors are still zero"
            )


def split_weight(weight_OI: Tensor, recipe: Recipe, *, seed: int = 0, objective: Objective | Moments = PLAIN) -> Split:
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
    return split_weights(weight_OI[None], recipe, seeds=(seed,), objectives=(objective,))[0]


def split_weights(
    weights_SOI: Tensor, recipe: Recipe, *, seeds: Sequence[int], objectives: Sequence[Objective | Moments]
) -> list[Split]:
    """Return the best splits of a stack of weights, each as `split_weight` finds it alone but for float32 rounding.

    The bytes depend on all weights of the stack and on their order.

    Args:
        weights_SOI: As for `split_weight`.
        seeds, objectives: One for each weight.

    Raises:
        BadInput: as for `split_weight`.
    """
    shape = tuple(weights_SOI.shape[1:])
    if len(shape) != 2 or weights_SOI.dtype not in FLOATS:
        raise BadInput(f"a float32, bfloat16 or float16 matrix can be split, not {weights_SOI.dtype} {shape}")
    if recipe.rank > min(shape):
        raise BadInput(f"rank {recipe.rank} is outside 0..{min(shape)}, the ranks of a {shape} matrix")
    for weight_OI, objective in zip(weights_SOI, objectives, strict=True):
        objective.check_fits(shape)
        check_finite(weight_OI)
    weights_SOI = weights_SOI.float().contiguous()
    device = weights_SOI.device
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    fitter = _Fitter(recipe, PLAIN, generators)
    factors = fitter.fit(weights_SOI) if recipe.order == "svd" else fitter.zeros(weights_SOI)
    feeds_back, passes = recipe.rounding == "feedback", recipe.iterations
    if recipe.rank == 0 or (feeds_back and all(isinstance(objective, Moments) for objective in objectives)):
        passes = 1  # without factors every pass gives the same; with moments the passes with feedback do the work
    splits = _best(_passes(weights_SOI, fitter, factors, torch.empty_like(weights_SOI), passes), fitter)
    for some in _weighted_together(objectives, feeds_back):
        objective = _stacked([objectives[number].to(device) for number in some], shape)
        fitter = _Fitter(recipe, objective, [generators[number] for number in some])
        some_SOI = weights_SOI if len(some) == len(splits) else weights_SOI[some]
        found = _best(_weighted_iterates(some_SOI, fitter, [splits[number] for number in some]), fitter)
        for number, split in zip(some, found, strict=True):
            splits[number] = split
    for number, objective in enumerate(objectives if feeds_back else ()):
        fitter = _Fitter(recipe, _stacked([objective.to(device)], shape), [generators[number]], feeds_back=True)
        (found,) = _best(_fed_back_iterates(weights_SOI[number][None], fitter, splits[number]), fitter)
        # the plain loop has another norm than moments
        splits[number] = found if isinstance(objective, Moments) else _continued(splits[number], found)
    return splits


def _stacked(objectives: Sequence[Objective | Moments], shape: tuple[int, int]) -> Objective | Moments:
    """Return the objective of a stack; moments are those of one matrix."""
    if isinstance(objectives[0], Moments):
        return objectives[0]
    return stacked([one for one in objectives if isinstance(one, Objective)], shape)


def _weighted_together(objectives: Sequence[Objective | Moments], feeds_back: bool) -> list[list[int]]:
    """Return the numbers of the weights whose loop with nearest codes is weighted; moments weight one at a time."""
    alone = [number for number, objective in enumerate(objectives) if isinstance(objective, Moments)]
    weighted = [n for n, objective in enumerate(objectives) if n not in alone and not objective.is_plain]
    return ([weighted] if weighted else []) + ([] if feeds_back else [[number] for number in alone])


def _continued(before: Split, found: Split) -> Split:
    """Return the better of a split and what the loop made of it, with the history of both."""
    history = (*before.history, *found.history[1:])
    if found.iteration == 1:
        return replace(before, history=history)
    return replace(found, iteration=len(before.history) + found.iteration - 1, history=history)


def check_finite(weight_OI: Tensor) -> None:
    """Raise BadInput with the number of NaNs and infinities if there are any."""
    if not torch.isfinite(weight_OI.sum()):  # one cheap pass; finite numbers may overflow too, so that a count decides
        num_bad = int((~torch.isfinite(weight_OI)).sum())
        if num_bad:
            raise BadInput(f"{num_bad} of {weight_OI.numel()} values are NaN or infinite")


@dataclass(frozen=True)
class _Factors:
    """The factors as they will be stored, and the rows whose span the next fit starts from, if there are any."""

    up_SOR: Tensor
    down_SRI: Tensor
    rows_SKI: Tensor | None


_Iterate = tuple[list[PackedBlocks], _Factors, Tensor]  # Q, B and A, W - Q


def _weighted_iterates(weights_SOI: Tensor, fitter: "_Fitter", plain: Sequence[Split]) -> Iterator[_Iterate]:
    """Yield the plain splits, their residuals with weighted factors, and then the iterates of the loop from there."""
    recipe = fitter.recipe
    residuals = [split.residual for split in plain]
    left_SOI = _left(weights_SOI, residuals, torch.empty_like(weights_SOI))
    up_SOR, down_SRI = (torch.stack([split.up_OR for split in plain]), torch.stack([split.down_RI for split in plain]))
    # first, so that no worse split can be the best one
    yield residuals, _Factors(up_SOR, down_SRI, None), left_SOI
    if recipe.rank > 0:  # without factors no fit can be weighted
        factors = fitter.fit(left_SOI, fitter.subspace(down_SRI))
        if recipe.end == "svd":
            yield residuals, factors, left_SOI
        yield from _passes(weights_SOI, fitter, factors, left_SOI, recipe.iterations)


def _fed_back_iterates(weights_SOI: Tensor, fitter: "_Fitter", before: Split) -> Iterator[_Iterate]:
    """Yield a split by nearest codes, then the iterates of the loop with feedback."""
    factors = _Factors(before.up_OR[None], before.down_RI[None], None)
    left_SOI = _left(weights_SOI, [before.residual], torch.empty_like(weights_SOI))
    yield [before.residual], factors, left_SOI
    passes = fitter.recipe.iterations if fitter.recipe.rank > 0 else 1
    if fitter.recipe.rank > 0:
        rows_SKI = fitter.subspace(factors.down_SRI)
        is_other_norm = isinstance(fitter.objective, Moments)  # than that of these factors
        factors = fitter.fit(left_SOI, rows_SKI) if is_other_norm else replace(factors, rows_SKI=rows_SKI)
    yield from _passes(weights_SOI, fitter, factors, left_SOI, passes)


def _passes(
    weights_SOI: Tensor, fitter: "_Fitter", factors: _Factors, work_SOI: Tensor, passes: int
) -> Iterator[_Iterate]:
    """Yield the iterate of every pass; W - Q is in `work_SOI`, which the next pass overwrites."""
    recipe = fitter.recipe
    for number in range(passes):
        # end="quantize" keeps the factors that Q was made with, so that they are fitted again only before the next Q
        if recipe.end == "quantize" and number > 0:
            factors = fitter.fit(work_SOI, factors.rows_SKI)
        torch.baddbmm(weights_SOI, factors.up_SOR.float(), factors.down_SRI.float(), alpha=-1, out=work_SOI)
        residuals = [fitter.encode(*one) for one in zip(work_SOI, factors.up_SOR, factors.down_SRI, strict=True)]
        work_SOI = _left(weights_SOI, residuals, work_SOI)
        if recipe.end == "svd":
            factors = fitter.fit(work_SOI, factors.rows_SKI)
        yield residuals, factors, work_SOI


def _left(weights_SOI: Tensor, residuals: Sequence[PackedBlocks], out_SOI: Tensor) -> Tensor:
    """Return W - Q in `out_SOI`, with Q as it is stored."""
    for residual, one_OI in zip(residuals, out_SOI, strict=True):
        residual.decode(out=one_OI)
    return torch.sub(weights_SOI, out_SOI, out=out_SOI)


def _best(iterates: Iterable[_Iterate], fitter: "_Fitter") -> list[Split]:
    """Return the iterates with the least errors; with stop="rise", a weight's iterates after an error that rose do not
    count, and none is made after the errors of all weights rose."""
    best: dict[int, Split] = {}
    histories: list[list[float]] = []
    for residuals, factors, left_SOI in iterates:
        squares_S = fitter.objective.squares(left_SOI, factors.up_SOR.float(), factors.down_SRI.float())
        distances = squares_S.sqrt().tolist()
        histories = histories or [[] for _ in distances]
        for number, (history, distance) in enumerate(zip(histories, distances, strict=True)):
            if fitter.recipe.stop == "rise" and _has_risen(history):
                continue
            # of equal errors the first is kept: a later one is not better, nor is one that is not finite
            if not history or distance < min(inf if isnan(one) else one for one in history):
                up_OR, down_RI = factors.up_SOR[number], factors.down_SRI[number]
                best[number] = Split(residuals[number], up_OR, down_RI, len(history) + 1, ())
            history.append(distance)
        if fitter.recipe.stop == "rise" and all(map(_has_risen, histories)):
            break
    return [replace(best[number], history=tuple(history)) for number, history in enumerate(histories)]


def _has_risen(history: Sequence[float]) -> bool:
    return len(history) > 1 and not history[-1] <= history[-2]  # nor is NaN


@dataclass(frozen=True)
class _Fitter:
    """What every pass of a stack uses: the recipe, the weights of its errors, and the draws of random sketches.

    Args:
        feeds_back: Whether residuals are rounded with feedback; then the stack has one matrix.
    """

    recipe: Recipe
    objective: Objective | Moments
    generators: Sequence[torch.Generator]
    feeds_back: bool = False

    def encode(self, matrix_OI: Tensor, up_OR: Tensor, down_RI: Tensor) -> PackedBlocks:
        """Return what is left for the residual, quantized."""
        recipe = self.recipe
        if self.feeds_back:
            metric = self.objective.metric(up_OR.float(), down_RI.float(), DAMPING[recipe.codec.bits])
            return round_with_feedback(matrix_OI, recipe.codec, metric, sweeps=recipe.sweeps)
        fits_scales = recipe.scales == "mse" or recipe.rounding == "feedback"
        return round_nearest(matrix_OI, recipe.codec) if fits_scales else recipe.codec.encode(matrix_OI)

    def zeros(self, weights_SOI: Tensor) -> _Factors:
        """Return the factors before the first fit."""
        (stack, rows, columns), rank, dtype = weights_SOI.shape, self.recipe.rank, self.recipe.dtype
        up_SOR = weights_SOI.new_zeros(stack, rows, rank, dtype=dtype)
        return _Factors(up_SOR, weights_SOI.new_zeros(stack, rank, columns, dtype=dtype), None)

    def fit(self, matrix_SOI: Tensor, start_SKI: Tensor | None = None) -> _Factors:
        """Return the best factors of a stack by the objective.

        Args:
            start_SKI: Rows of an earlier fit; from there one pass is enough. None starts from a random sketch.
        """
        rank, dtype = self.recipe.rank, self.recipe.dtype
        if rank == 0:
            return self.zeros(matrix_SOI)
        scaled_SOI = self.objective.scaled(matrix_SOI)
        if self.recipe.exact:
            top = svd.exact_svd(scaled_SOI, rank)
        else:
            passes = FIRST_PASSES if start_SKI is None else LATER_PASSES
            draws = self.generators
            top = svd.randomized_svd(scaled_SOI, rank, passes=passes, generator=draws, start_KI=start_SKI)
        if self.objective.is_plain:
            return _Factors(*top.factors(rank, dtype), top.right_KI)
        # both halves get the same lengths: training starts from balanced factors (PiSSA, eq. 2-3), which do not depend
        # on the unit of the weights
        up_SOR, down_SRI = self.objective.unscaled(top.left_OK[..., :rank], top.right_KI[..., :rank, :])
        up_SR, down_SR = (torch.linalg.vector_norm(one, dim=dim) for one, dim in ((up_SOR, -2), (down_SRI, -1)))
        lengths_SR = (top.values_K[..., :rank] * up_SR * down_SR).sqrt()  # of either half
        up_SOR, down_SRI = up_SOR * (lengths_SR / up_SR)[..., None, :], down_SRI * (lengths_SR / down_SR)[..., None]
        return _Factors(up_SOR.to(dtype), down_SRI.to(dtype), top.right_KI)

    def subspace(self, down_SRI: Tensor) -> Tensor:
        """Return rows that span those of stored factors, scaled: a fit from there is at least as good."""
        scaled_SRI = self.objective.scaled_columns(down_SRI.float())
        more_SKI = svd.normal((svd.OVERSAMPLE, scaled_SRI.shape[-1]), self.generators, scaled_SRI.device)
        return torch.cat((scaled_SRI, more_SKI), dim=-2)


def stack_on(device: torch.device, weights: Sequence[Tensor]) -> Tensor:
    """Return weights as a stack [S, O, I] on a device; one weight that is there is not copied."""
    moved = [weight_OI.to(device) for weight_OI in weights]
    return torch.stack(moved) if len(moved) > 1 else moved[0][None]
