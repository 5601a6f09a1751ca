"""Choose codes and scales so that what the factors cannot absorb is small; stock readers decode the result.

Nearest codes minimize the error of each number. With a second moment M of what the errors meet, the error of a row e is
e M e^T. Error feedback (GPTQ, arXiv:2210.17323; LDLQ of QuIP, arXiv:2307.13304) rounds the columns in order, and moves
each column's error onto the later ones: with M^-1 = U^T U, U upper triangular, column k changes by -e_j U_jk / U_jj.
Sweeps of coordinate descent follow: each column gets the codes that are best given all others, and each block of scales
its best scales, so that no step makes e M e^T larger.

**Deflation.** Factors that are fitted after the rounding remove the error in the span that they take. So M leaves it
out: with inputs of second moment H = L L^T and the rows V of the current factors in the space of L, orthonormal,
M = L (I - V V^T) L^T + damping. The rounding puts its error where the factors remove it; that helps with H = I, too.

Shape suffixes: O = out features, I = in features, B = blocks, E = elements of one block, N = elements, R = rank,
C = blocks of a row, J = columns of a tile. Matrices are worked on as [I, O]: a column is then contiguous.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor
from torch.nn.functional import pad

from qsvd.numerics import codebook
from qsvd.numerics.codec import SMALLEST_SCALE, Codec, PackedBlocks, plain_scales

TILE = 128  # columns whose errors are moved onto the later ones by one matrix product
REFITS = 3  # of a scale, after the best of several was taken
WIDE = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
SHARES = {  # bits -> shares of the largest magnitude that are tried as scales; three times as many gain 0.2 %
    2: (1.0, 0.92, 0.84, 0.76, 0.68, 0.6, 0.52, 0.44, 0.36),
    3: (1.0, 0.93, 0.86, 0.79, 0.72, 0.65, 0.58, 0.5),
    4: WIDE,
    8: WIDE,
}
DAMPING = {2: 0.1, 3: 0.03, 4: 0.01, 8: 0.01}  # bits -> share of the mean of M's diagonal that is added to it
LEAST_DAMPING, MORE_DAMPING = 1e-6, 10.0  # of the mean, and times the last one, where the factorization fails
RUN = {"cpu": 1 << 20, "cuda": 1 << 26}  # elements whose scales are chosen at a time


def round_nearest(matrix_OI: Tensor, codec: Codec, columns_I: Tensor | None = None) -> PackedBlocks:
    """Encode a matrix by nearest codes, with the scales of least squared error instead of the largest magnitudes.

    Args:
        matrix_OI: float32 [O, I], finite.
        columns_I: float32 [I], weights of the squared errors of each column; None is 1.
    """
    shape = (matrix_OI.shape[0], matrix_OI.shape[1])
    blocks_BE = _in_blocks(matrix_OI.reshape(-1), codec.block_size)
    scales = codec.stored_scales(_scales(blocks_BE, codec, columns_I, shape[1]))
    inverse_B = _inverse(plain_scales(scales).float())
    codes_BE = torch.empty(blocks_BE.shape, dtype=torch.uint8, device=blocks_BE.device)
    for run in _runs(blocks_BE):
        scaled_BE = blocks_BE[run] * inverse_B[run, None]
        codes_BE[run] = codec.nearest(scaled_BE.view(-1)).view(scaled_BE.shape)
    return codec.packed(codes_BE.view(-1)[: matrix_OI.numel()], scales, shape)


def round_with_feedback(
    target_OI: Tensor, codec: Codec, down_RI: Tensor, columns_I: Tensor | None = None, *, sweeps: int = 1
) -> PackedBlocks:
    """Encode a matrix with error feedback against what factors cannot absorb, and sweeps of coordinate descent.

    Args:
        target_OI: float32 [O, I], finite: W - B A.
        down_RI: float32 [R, I], A: the errors of rows in its span are free.
        columns_I: float32 [I], above zero: the weight of a column's error is its square. None is 1.
        sweeps: At least 1.
    """
    moment_II = deflated(down_RI, columns_I, damping=DAMPING[codec.bits])
    squares_I = None if columns_I is None else columns_I.square()
    state = State.start(target_OI, codec, squares_I)
    feed_back(state, moment_II)
    for _ in range(sweeps):
        sweep(state, moment_II, refits=state.is_aligned)
    stored = codec.stored_scales(state.scales_in_order())
    is_rounded = state.set_scales(plain_scales(stored).float())
    if is_rounded:  # the codes were chosen for other scales
        sweep(state, moment_II, refits=False)
    return codec.packed(state.codes_IO.t().reshape(-1), stored, (target_OI.shape[0], target_OI.shape[1]))


def deflated(down_RI: Tensor, columns_I: Tensor | None, *, damping: float) -> Tensor:
    """Return the second moment of what the factors leave, float32 [I, I], with damping."""
    scaled_RI = down_RI if columns_I is None else down_RI * columns_I
    span_IR = torch.linalg.qr(scaled_RI.t())[0]
    moment_II = -(span_IR @ span_IR.t())
    moment_II.diagonal().add_(1)
    if columns_I is not None:
        moment_II.mul_(columns_I).mul_(columns_I[:, None])
    mean = float(columns_I.square().mean()) if columns_I is not None else 1.0
    moment_II.diagonal().add_(damping * mean)
    return moment_II


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
            scales_B = _scales(_in_blocks(target_OI.reshape(-1), size), codec, weights_I, columns)
            scales_CO = _of_numbers(scales_B, size, rows, columns)
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

    def choose_scales(self, column: int, part_EO: Tensor) -> None:
        """Choose the scales of the blocks that begin at a column, for what the columns have to hold now."""
        weights_E = None if self.weights_I is None else self.weights_I[column : column + self.run]
        self.scales_CO[column // self.run] = _fitted(part_EO.t().contiguous(), self.codec, weights_E)

    def round_column(self, column: int, wanted_O: Tensor) -> Tensor:
        """Choose the nearest codes for a column; return what they decode to."""
        scale_O = self.scales_CO[column // self.run]
        codes_O = self.codec.nearest(wanted_O * _inverse(scale_O))
        self.codes_IO[column] = codes_O
        return self.codec.levels(scale_O.device)[codes_O.int()] * scale_O

    def levels_of(self, columns: slice) -> Tensor:
        """Return the levels of the codes of some columns, float32."""
        return self.codec.levels(self.codes_IO.device)[self.codes_IO[columns].int()]

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
            self.scales_CO = _of_numbers(scales_B, self.codec.block_size, rows, columns)
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
                state.choose_scales(column, work_IO[column : column + state.run])
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


def _in_blocks(flat_N: Tensor, block_size: int) -> Tensor:
    """Return numbers in rows of one block; zeros fill the last one."""
    return pad(flat_N, (0, -len(flat_N) % block_size)).view(-1, block_size)


def _scales(blocks_BE: Tensor, codec: Codec, weights_I: Tensor | None, columns: int) -> Tensor:
    """Return the scales of least weighted squared error, float32 [B]."""
    scales_B = torch.empty(len(blocks_BE), device=blocks_BE.device)
    for run in _runs(blocks_BE):
        parts_BE, weights_BE = blocks_BE[run], None
        if weights_I is not None:
            first = run.start * codec.block_size
            places = torch.arange(first, first + parts_BE.numel(), device=parts_BE.device)
            weights_BE = weights_I[places % columns].view(parts_BE.shape)
        scales_B[run] = _fitted(parts_BE, codec, weights_BE)
    return scales_B


def _runs(blocks_BE: Tensor) -> Iterator[slice]:
    """Yield blocks that are worked on together."""
    step = max(RUN[blocks_BE.device.type] // blocks_BE.shape[1], 1)
    yield from (slice(first, first + step) for first in range(0, len(blocks_BE), step))


def _fitted(blocks_BE: Tensor, codec: Codec, weights_BE: Tensor | None) -> Tensor:
    search = codebook.Search(SHARES[codec.bits], codec.has_signed_scales, REFITS)
    largest_B = blocks_BE.abs().amax(dim=1) / codec.reach
    return codebook.fitted(blocks_BE, largest_B, codec, search, weights_BE)


def _of_numbers(scales_B: Tensor, size: int, rows: int, columns: int) -> Tensor:
    """Return the scale of every number, [I, O]."""
    return scales_B.repeat_interleave(size)[: rows * columns].view(rows, columns).t().contiguous()


def _inverse(scales_B: Tensor) -> Tensor:
    """Return 1 / scale; 0 for a scale of zero, whose numbers take the code of zero."""
    return torch.where(scales_B == 0, 0, 1 / scales_B)
