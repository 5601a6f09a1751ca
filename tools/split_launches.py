"""Estimate how long splits by error feedback take on a GPU, without one: python tools/split_launches.py

The steps of a split are counted on small random matrices: every operation of torch that is no view is one launch, and a
kernel for the columns of a tile is one. They are linear in the waves of the feedback (tiles of columns and groups of
rows) and in the tiles of the sweeps, so that a fit gives those of large matrices; one more matrix checks the fit.
Products, factorizations and triangular solves are counted by their operations. Time is launches, columns of kernels and
operations, one after the other, at the rates of the options.

Shape suffixes: O = out features, I = in features.
"""

from dataclasses import dataclass
from itertools import product
from math import ceil
from typing import Any

import numpy
import torch
import tyro
from splits.synthetic import moment
from torch.utils._python_dispatch import TorchDispatchMode

from qsvd.decompose import feedback, row_feedback
from qsvd.decompose.alternate import Recipe, split_weight
from qsvd.decompose.moments import Moments
from qsvd.numerics.names import codec_named
from qsvd.options.quantizing import BEST_PASSES, FEEDBACK_PASSES, SWEEPS

TILE, RANK = 64, 64
GROUP, PARTS = row_feedback.GROUP, row_feedback.PARTS
CHANGED, BY_TORCH = row_feedback.CHANGED, row_feedback.CHANGED_BY_TORCH
SMALL = ((512, 512), (512, 1024), (1024, 512), (1024, 1024), (768, 1536))  # the last checks the fit
NO_KERNEL = ("view", "expand", "select", "slice", "transpose", "permute", "detach", "alias", "as_strided", "diagonal")
NO_KERNEL_NAMES = ("t", "empty", "empty_like", "new_empty", "unsqueeze", "squeeze", "_unsafe_view", "unbind", "split")
GATE = (28672, 8192)
LAYER = ((8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192), GATE, GATE, (8192, 28672))  # a block of Llama-3-70B
FIT = 0.1  # share of the launches by which the fit may miss
BLOCKS, TOKENS = 80, 128 * 2048


@dataclass(frozen=True)
class Options:
    """What a GPU does."""

    launch: float = 7e-6  # seconds of an operation of torch that is called from Python
    column: float = 3e-6  # seconds of a column in a kernel
    tflops: float = 40.0  # of float32 products, below the 67 that an H100 SXM has on paper
    half_tflops: float = 355.0  # of a training step in bf16: docs/results/2026-11-27-gpu.md


class Launches(TorchDispatchMode):
    """Counts operations of torch that launch a kernel, and stands in for qsvd's kernels.

    Args:
        without_kernels: Count every step of a tile as an operation of torch.
    """

    def __init__(self, without_kernels: bool) -> None:
        super().__init__()
        self.without_kernels, self.is_on, self.count, self.columns = without_kernels, True, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operation and do it."""
        name = func.overloadpacket.__name__
        self.count += self.is_on and not name.startswith(NO_KERNEL) and name not in NO_KERNEL_NAMES
        return func(*args, **(kwargs or {}))

    def for_matrix(self, _matrix: Any) -> "Launches | None":
        """Return what chooses the columns of a tile: `feedback.kernels_for`."""
        return self if self.is_on and not self.without_kernels else None

    def chosen(self, given: Any) -> Any:
        """Choose codes by torch's operations, which count as one launch."""
        self.is_on, self.count, self.columns = False, self.count + 1, self.columns + len(given.before_EPG)
        found = given.chosen()
        self.is_on = True
        return found

    def changed(self, _codec: Any, _state: Any, pull_EG: Any, _own_EE: Any, _own_GG: Any) -> Any:
        """Change no code, and count one launch."""
        self.count, self.columns = self.count + 1, self.columns + len(pull_EG)
        return torch.zeros_like(pull_EG)


def main() -> None:
    """Print launches, operations and hours of each kind of split."""
    options = tyro.cli(Options, description=__doc__)
    row_feedback._quick = lambda tensor: tensor  # as on a GPU, so that every step is an operation of torch
    row_feedback._search = lambda between, wanted: torch.searchsorted(between.contiguous(), wanted.contiguous())
    print("| moments, passes, sweeps | kernels | 28672 x 8192: launches | s | columns, s | products, s | 70B, h |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    good, best = (FEEDBACK_PASSES, SWEEPS["good"]), (BEST_PASSES, SWEEPS["best"])
    kinds = ((False, (1, 1)), (False, good), (True, (1, 1)), (True, best))
    for without_kernels, (both, (passes, sweeps)) in product((True, False), kinds):
        row_feedback.CHANGED = BY_TORCH if without_kernels else CHANGED  # these matrices are on a CPU
        counts = fitted(both, passes, sweeps, without_kernels)
        total, shown = 0.0, []
        for rows, columns in LAYER:
            launches, steps = features(rows, columns, both, without_kernels) @ counts
            products = operations(rows, columns, both, passes, sweeps) / options.tflops / 1e12
            times = (launches * options.launch, steps * options.column, products)
            total += sum(times)
            shown = [f"{launches:,.0f}", *(f"{time:.1f}" for time in times)] if (rows, columns) == GATE else shown
        kind = f"{'H and G' if both else 'H'}, {passes}, {sweeps} | {'no' if without_kernels else 'yes'}"
        print(f"| {kind} | {' | '.join(shown)} | {total * BLOCKS / 3600:.2f} |")
    walks(options)


def features(rows: int, columns: int, both: bool, without_kernels: bool) -> numpy.ndarray:
    """Return what launches are linear in: 1, the waves of the feedback, and the pairs of a tile and rows in a sweep."""
    tiles, groups = columns / TILE, (ceil(rows / GROUP) if both else 1)
    swept = max(PARTS, ceil(rows / (BY_TORCH if without_kernels else CHANGED))) if both else 1
    return numpy.array((1, tiles + groups - 1, tiles * groups if both else 0, tiles * swept))


def fitted(both: bool, passes: int, sweeps: int, without_kernels: bool) -> numpy.ndarray:
    """Return launches and columns of kernels for each feature."""
    how = {"iterations": passes, "sweeps": sweeps, "scales": "mse", "rounding": "feedback"}
    recipe = Recipe(codec_named("nf4+dq"), RANK, stop="never", **how)
    counts = []
    for rows, columns in SMALL:
        inputs_II, outputs_OO = moment(torch.ones(columns), "inputs"), moment(torch.ones(rows), "outputs")
        with Launches(without_kernels) as found:
            feedback.kernels_for = row_feedback.kernels_for = found.for_matrix
            split_weight(torch.randn(rows, columns), recipe, objective=Moments(inputs_II, outputs_OO if both else None))
        counts.append((found.count, found.columns))
    table = numpy.array([features(rows, columns, both, without_kernels) for rows, columns in SMALL])
    terms = numpy.linalg.lstsq(table[:-1], numpy.array(counts[:-1], dtype=float), rcond=None)[0]
    if abs((table[-1] @ terms)[0] / counts[-1][0] - 1) > FIT:
        raise SystemExit(f"the fit has {(table[-1] @ terms)[0]:,.0f} launches where {counts[-1][0]:,} were counted")
    return terms


def operations(rows: int, columns: int, both: bool, passes: int, sweeps: int) -> float:
    """Return the operations of the large products, factorizations and solves."""
    wide, high = 2.0 * rows * columns**2, 2.0 * rows**2 * columns  # products with H and with G
    factors = columns**3 / 3 + (rows**3 / 3 if both else 0)
    errors = (wide + (high if both else 0)) / 2  # the roots are triangular
    one_pass = factors + wide / 2 + sweeps * (wide + (high if both else 0)) + errors
    if both:
        one_pass += high / 2 + rows**3 / 3  # feedback over groups, and what it moves
    fit = 2.0 * RANK * 6 * (rows * columns + columns**2 + (rows**2 if both else 0))
    return factors + errors + passes * (one_pass + fit)


def walks(options: Options) -> None:
    """Print the hours of the two walks over the model and of the moments."""
    weights = sum(rows * columns for rows, columns in LAYER) * BLOCKS
    inputs, outputs = (8192, 8192, 8192, 28672), (8192, 1024, 1024, 8192, 28672, 28672, 8192)
    sides = {"H": inputs, "H and G": (*inputs, *outputs)}
    for name, some in sides.items():
        passes = 2 if name == "H" else 5  # forward, and again with the split block; with G forward, again, backward
        moments = 2.0 * TOKENS * sum(side**2 for side in some) * BLOCKS / options.tflops / 1e12
        walk = passes * 2.0 * weights * TOKENS / options.half_tflops / 1e12
        print(f"{name}: walk {walk / 3600:.2f} h, moments {moments / 3600:.2f} h")


if __name__ == "__main__":
    main()
