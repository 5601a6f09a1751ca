"""Error feedback over the columns of a matrix, and coordinate descent on its codes and scales.

The error of a row e is e M e^T, with M the second moment of what errors meet. Error feedback (GPTQ, arXiv:2210.17323;
LDLQ of QuIP, arXiv:2307.13304) rounds the columns in order, and moves each column's error onto the later ones: with
M^-1 = U^T U, U upper triangular, column k changes by -e_j U_jk / U_jj. Sweeps of coordinate descent follow: each column
gets the codes that are best given all others, and each block of scales its best scales, so that no step makes the error
larger. row_feedback.py does the same where rows meet each other, too.

Shape suffixes: O = out features, I = in features, E = elements of one block, C = blocks of a row, J = columns of a
tile, B = blocks. Matrices are worked on as [I, O]: a column is then contiguous.
"""

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from qsvd.decompose.scales import fitted, in_blocks, inverse, of_numbers, scales_of
from qsvd.numerics.codec import SMALLEST_SCALE, Codec

TILE = 128  # columns whose errors are moved onto the later ones by one matrix product
LEAST_DAMPING, MORE_DAMPING = 1e-6, 10.0  # of the mean, and times the last one, where the factorization fails


def upper_factor(moment_II: Tensor) -> Tensor:
    """Return U, upper triangular, with M^-1 = U^T U: the inverse of the Cholesky factor of M from its last row up."""
    damping, mean = 0.0, float(moment_II.diagonal().mean())
    while True:
        flipped_II = moment_II.flip(0, 1)
        flipped_II.diagonal().add_(damping)
        lower_II, info = torch.linalg.cholesky_ex(flipped_II)
        del flipped_II
        if int(info) == 0:
            break
        damping = max(damping * MORE_DAMPING, LEAST_DAMPING * mean)
    upper_II = lower_II.flip(0, 1)
    del lower_II
    return torch.linalg.solve_triangular(upper_II, torch.eye(len(upper_II), device=upper_II.device), upper=True)


@dataclass
class State:
    """A matrix whose codes and scales are being chosen.

    Args:
        target_IO, left_IO: T and T - Q, float32.
        codes_IO: uint8.
        scales_CO: float32: of every block of a row, or of every number if blocks cross rows.
        weights_I: Of the squared errors, for the choice of a scale; None is 1.
    """

    codec: Codec
    target_IO: Tensor
    left_IO: Tensor
    codes_IO: Tensor
    scales_CO: Tensor
    weights_I: Tensor | None

    @classmethod
    def start(cls, target_OI: Tensor, codec: Codec, weights_I: Tensor | None) -> "State":
        """Return the state before the first column; blocks that cross rows have their scales already."""
        (rows, columns), size = target_OI.shape, codec.block_size
        target_IO = target_OI.t().contiguous()
        codes_IO = torch.empty(columns, rows, dtype=torch.uint8, device=target_OI.device)
        if columns % size == 0:
            scales_CO = target_IO.new_empty(columns // size, rows)
        else:
            scales_B = scales_of(in_blocks(target_OI.reshape(-1), size), codec, weights_I, columns)
            scales_CO = of_numbers(scales_B, size, rows, columns)
        return cls(codec, target_IO, torch.empty_like(target_IO), codes_IO, scales_CO, weights_I)

    @property
    def is_aligned(self) -> bool:
        """Whether no block crosses rows."""
        return len(self.scales_CO) < len(self.target_IO)

    @property
    def run(self) -> int:
        """Columns that share a row of scales_CO."""
        return len(self.target_IO) // len(self.scales_CO)

    @property
    def tile(self) -> int:
        """Columns of a tile: whole blocks."""
        return max(TILE, self.run)

    def choosescales_of(self, column: int, part_EO: Tensor) -> None:
        """Choose the scales of the blocks that begin at a column, for what the columns have to hold now."""
        weights_E = None if self.weights_I is None else self.weights_I[column : column + self.run]
        self.scales_CO[column // self.run] = fitted(part_EO.t().contiguous(), self.codec, weights_E)

    def round_column(self, column: int, wanted_O: Tensor) -> Tensor:
        """Choose the nearest codes for a column; return what they decode to."""
        scale_O = self.scales_CO[column // self.run]
        codes_O = self.codec.nearest(wanted_O * inverse(scale_O))
        self.codes_IO[column] = codes_O
        return self.codec.levels(scale_O.device)[codes_O.int()] * scale_O

    def levels_of(self, columns: slice) -> Tensor:
        """Return the levels of the codes of some columns, float32."""
        return self.codec.levels(self.codes_IO.device)[self.codes_IO[columns].int()]

    def rows(self, rows: slice) -> "State":
        """Return the state of some rows, in copies; `put` takes it back."""
        parts = (self.target_IO, self.left_IO, self.codes_IO, self.scales_CO)
        return State(self.codec, *(part[:, rows].contiguous() for part in parts), self.weights_I)

    def put(self, rows: slice, part: "State") -> None:
        """Take over what was chosen for some rows; their target stays as it was."""
        self.codes_IO[:, rows], self.scales_CO[:, rows] = part.codes_IO, part.scales_CO
        self.left_IO[:, rows] = part.left_IO

    def scales_in_order(self) -> Tensor:
        """Return the scales of all blocks in the order of the matrix [B]."""
        if self.is_aligned:
            return self.scales_CO.t().reshape(-1)
        return self.scales_CO.t().reshape(-1)[:: self.codec.block_size].contiguous()

    def set_scales(self, scales_B: Tensor) -> bool:
        """Take scales in the order of the matrix, and decode the codes with them; return whether any is another."""
        columns, rows = self.target_IO.shape
        before_CO = self.scales_CO
        if self.is_aligned:
            self.scales_CO = scales_B.view(rows, -1).t().contiguous()
        else:
            self.scales_CO = of_numbers(scales_B, self.codec.block_size, rows, columns)
        for first in range(0, columns, self.tile):
            tile = slice(first, first + self.tile)
            scales_JO = self.scales_CO[first // self.run : ceil((first + self.tile) / self.run)]
            values_JO = self.levels_of(tile) * scales_JO.repeat_interleave(self.run, dim=0)
            torch.sub(self.target_IO[tile], values_JO, out=self.left_IO[tile])
        return not torch.equal(before_CO, self.scales_CO)


def feed_back(state: State, moment_II: Tensor) -> None:
    """Round the columns in order; the error of each is moved onto the later ones."""
    upper_II = upper_factor(moment_II)
    work_IO = state.target_IO.clone()
    columns = len(work_IO)
    for first in range(0, columns, state.tile):
        last = min(first + state.tile, columns)
        moved_JO = torch.empty_like(work_IO[first:last])
        for column in range(first, last):
            if state.is_aligned and column % state.run == 0:
                state.choosescales_of(column, work_IO[column : column + state.run])
            wanted_O = work_IO[column]
            rounded_O = state.round_column(column, wanted_O)
            torch.sub(state.target_IO[column], rounded_O, out=state.left_IO[column])
            moved_O = torch.div(wanted_O - rounded_O, upper_II[column, column], out=moved_JO[column - first])
            work_IO[column + 1 : last].addr_(upper_II[column, column + 1 : last], moved_O, alpha=-1)
        work_IO[last:].addmm_(upper_II[first:last, last:].t(), moved_JO, alpha=-1)


def sweep(state: State, moment_II: Tensor, *, refits: bool) -> None:
    """Give each column the codes that are best given all others, and then each block of scales its best scales."""
    columns, left_IO = len(moment_II), state.left_IO
    for first in range(0, columns, state.tile):
        last = min(first + state.tile, columns)
        own_JJ = moment_II[first:last, first:last]
        pull_JO = moment_II[first:last] @ left_IO
        moved_JO = torch.empty_like(pull_JO)
        for column in range(first, last):
            at = column - first
            old_O = state.target_IO[column] - left_IO[column]
            rounded_O = state.round_column(column, torch.addcdiv(old_O, pull_JO[at], own_JJ[at, at]))
            torch.sub(old_O, rounded_O, out=moved_JO[at])
            torch.sub(state.target_IO[column], rounded_O, out=left_IO[column])
            pull_JO[at + 1 :].addr_(own_JJ[at + 1 :, at], moved_JO[at])
        if refits:
            pull_JO.addmm_(own_JJ.triu(), moved_JO)
            _refit_scales(state, own_JJ, pull_JO, first, last)


def _refit_scales(state: State, own_JJ: Tensor, pull_JO: Tensor, first: int, last: int) -> None:
    """Give the blocks of a tile their best scales for their codes, one after another.

    Args:
        pull_JO: M (T - Q) at the tile.
    """
    for column in range(first, last, state.run):
        block, here = slice(column, column + state.run), slice(column - first, column - first + state.run)
        levels_EO, scale_O = state.levels_of(block), state.scales_CO[column // state.run]
        curve_O = (levels_EO * (own_JJ[here, here] @ levels_EO)).sum(dim=0)
        step_O = (levels_EO * pull_JO[here]).sum(dim=0) / curve_O.clamp(min=SMALLEST_SCALE)
        is_better = (curve_O > 0) & (state.codec.has_signed_scales | (scale_O + step_O > 0))
        step_O = torch.where(is_better, step_O, 0)
        change_EO = levels_EO * step_O
        scale_O += step_O
        state.left_IO[block] -= change_EO
        pull_JO.addmm_(own_JJ[:, here], change_EO, alpha=-1)
