"""Error feedback over the columns of a matrix, and coordinate descent on its codes and scales.

The error of a row e is e M e^T, with M the second moment of what errors meet. Error feedback (GPTQ, arXiv:2210.17323;
LDLQ of QuIP, arXiv:2307.13304) rounds the columns in order, and moves each column's error onto the later ones: with
M = S S^T, S upper triangular, column k changes by e_j S_jk / S_kk. Sweeps of coordinate descent follow: each column
gets the codes that are best given all others, and each block of scales its best scales, so that no step makes the error
larger. row_feedback.py does the same where rows meet each other, too.

Shape suffixes: O = out features, I = in features, E = elements of one block, C = blocks of a row, J, K = columns of a
tile, G = rows of a group, P = pairs of a tile and a group, B = blocks. Matrices are worked on as [I, O]: a column is
then contiguous.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from types import ModuleType

import torch
from torch import Tensor

from qsvd.decompose.columns import Columns
from qsvd.decompose.scales import fitted, in_blocks, of_numbers, scales_of
from qsvd.numerics import normal_float
from qsvd.numerics.codec import SMALLEST_SCALE, Codec

TILE = 64  # columns whose errors are moved onto the later ones by one matrix product
WIDE = 4  # tiles of a sweep whose pull is one matrix product
LEAST_DAMPING, MORE_DAMPING, MOST_DAMPING = 1e-6, 10.0, 1e6  # of the mean, times the last one, and our fault


def upper_factor(moment_II: Tensor) -> Tensor:
    """Return S, upper triangular, with M = S S^T: the Cholesky factor of M from its last row up."""
    damping, mean = 0.0, float(moment_II.diagonal().mean())
    while True:
        flipped_II = moment_II.flip(0, 1)
        flipped_II.diagonal().add_(damping)
        lower_II, info = torch.linalg.cholesky_ex(flipped_II)
        del flipped_II
        if int(info) == 0:
            return lower_II.flip(0, 1)
        damping = max(damping * MORE_DAMPING, LEAST_DAMPING * mean)
        assert 0 < damping < MOST_DAMPING * mean, "a finite matrix with a large diagonal has a factor"


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

    @property
    def step(self) -> int:
        """Columns whose scales are known together, or as many of them as a tile should have."""
        return min(TILE, self.run) if self.is_aligned else TILE

    def scales_of(self, columns: slice) -> Tensor:
        """Return the scales of some columns, whole blocks or a part of one; every `run` columns share a row."""
        return self.scales_CO[columns.start // self.run : ceil(columns.stop / self.run)]

    def levels_of(self, columns: slice) -> Tensor:
        """Return the levels of the codes of some columns, float32."""
        codes_JO = self.codes_IO[columns]
        return self.codec.values(codes_JO.reshape(-1)).view(codes_JO.shape)

    def rows(self, rows: Tensor) -> "State":
        """Return the state of some rows, in copies; `put` takes it back."""
        target_IO, left_IO, codes_IO = self.target_IO[:, rows], self.left_IO[:, rows], self.codes_IO[:, rows]
        return State(self.codec, target_IO, left_IO, codes_IO, self.scales_CO[:, rows], self.weights_I)

    def put(self, rows: Tensor, part: "State") -> None:
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
            scales_JO = self.scales_of(slice(first, min(first + self.tile, columns)))
            values_JO = self.levels_of(tile) * scales_JO.repeat_interleave(self.run, dim=0)
            torch.sub(self.target_IO[tile], values_JO, out=self.left_IO[tile])
        return not torch.equal(before_CO, self.scales_CO)


def kernels_for(matrix: Tensor) -> ModuleType | None:
    """Return kernels.py for a matrix that Triton can work on; None if torch's operations have to."""
    if normal_float.kernels_for(matrix) is None:
        return None
    from qsvd.decompose import kernels

    return kernels


def chosen(columns: Columns) -> tuple[Tensor, Tensor]:
    """Return the codes of a tile, uint8, and what they decode to, float32 [E, P, G]."""
    kernels = kernels_for(columns.before_EPG)
    return columns.chosen() if kernels is None else kernels.chosen(columns)


def feed_back(state: State, moment_II: Tensor) -> None:
    """Round the columns in order; the error of each is moved onto the later ones."""
    feed_back_groups(state, moment_II, None, state.target_IO.shape[1])


def feed_back_groups(state: State, moment_II: Tensor, moves_OO: Tensor | None, group: int) -> None:
    """Round a matrix with feedback over the columns of each group of rows, and over the groups.

    The groups go through the tiles of columns one tile apart, so that many pairs of a group and a tile are worked on at
    once: a pair needs the errors of earlier groups at its columns, and of its group at earlier columns.

    Args:
        moves_OO: What the error of a row adds to each row of a later group; None if there is one group.
    """
    columns, rows = state.target_IO.shape
    upper_II = upper_factor(moment_II)
    upper_II /= upper_II.diagonal().clone()  # what the error of a column adds to each later one
    # what groups wanted, with the errors of earlier ones, minus what they got
    fed_IO = state.left_IO if moves_OO is None else torch.empty_like(state.left_IO)
    tiles = [slice(first, min(first + state.tile, columns)) for first in range(0, columns, state.tile)]
    groups = [slice(first, min(first + group, rows)) for first in range(0, rows, group)]
    for wave in range(len(tiles) + len(groups) - 1):
        pairs = [(tiles[wave - at], here) for at, here in enumerate(groups) if 0 <= wave - at < len(tiles)]
        tile_JPG = state.target_IO.new_zeros(state.tile, len(pairs), group)
        pulled_JPG = torch.zeros_like(tile_JPG)
        for at, pair in enumerate(pairs):
            (tile, here), target_JG = pair, state.target_IO[pair]
            if moves_OO is not None and here.start > 0:
                target_JG = torch.addmm(target_JG, state.left_IO[tile, : here.start], moves_OO[: here.start, here])
            place = (slice(target_JG.shape[0]), at, slice(target_JG.shape[1]))
            tile_JPG[place] = target_JG
            pulled_JPG[place] = torch.addmm(target_JG, upper_II[: tile.start, tile].mT, fed_IO[: tile.start, here])
        values_JPG = _round_tiles(state, pairs, upper_II, tile_JPG, pulled_JPG)
        for at, pair in enumerate(pairs):
            place = (slice(pair[0].stop - pair[0].start), at, slice(pair[1].stop - pair[1].start))
            state.left_IO[pair] = state.target_IO[pair] - values_JPG[place]
            if moves_OO is not None:
                fed_IO[pair] = tile_JPG[place] - values_JPG[place]


def _round_tiles(
    state: State, pairs: Sequence[tuple[slice, slice]], upper_II: Tensor, tile_JPG: Tensor, pulled_JPG: Tensor
) -> Tensor:
    """Choose the codes and scales of tiles, column by column; return what they decode to [J, P, G].

    Args:
        pairs: The columns and rows of each tile.
        tile_JPG, pulled_JPG: What is rounded, without and with feedback from earlier columns; zeros beyond the matrix.
    """
    size, _, group = tile_JPG.shape
    moves_JKP = tile_JPG.new_zeros(size, size, len(pairs))
    for at, (tile, _) in enumerate(pairs):
        width = tile.stop - tile.start
        moves_JKP[:width, :width, at] = upper_II[tile, tile]
    scales_CPG = _known_scales(state, pairs, group)
    codes_JPG = torch.empty(tile_JPG.shape, dtype=torch.uint8, device=tile_JPG.device)
    values_JPG = torch.empty_like(tile_JPG)
    for first in range(0, size, state.step):
        here, later = slice(first, first + state.step), slice(first + state.step, None)
        of_scales = slice(first // state.run, ceil(here.stop / state.run))
        if state.is_aligned and first % state.run == 0:
            scales_CPG[of_scales] = _best_scales(state, pairs, first, pulled_JPG[first : first + state.run])
        moves_EEP = moves_JKP[here, here]
        columns = Columns(state.codec, tile_JPG[here], pulled_JPG[here], moves_EEP, scales_CPG[of_scales], state.run)
        codes_JPG[here], values_JPG[here] = chosen(columns)
        if here.stop < size:
            changes_PEG = (values_JPG[here] - tile_JPG[here]).transpose(0, 1)
            pulled_JPG[later].transpose(0, 1).baddbmm_(moves_JKP[here, later].permute(2, 1, 0), changes_PEG, alpha=-1)
    for at, (tile, here) in enumerate(pairs):
        width, height = tile.stop - tile.start, here.stop - here.start
        state.codes_IO[tile, here] = codes_JPG[:width, at, :height]
        blocks = slice(tile.start // state.run, tile.stop // state.run)
        state.scales_CO[blocks, here] = scales_CPG[: width // state.run, at, :height]
    return values_JPG


def _known_scales(state: State, pairs: Sequence[tuple[slice, slice]], group: int) -> Tensor:
    """Return the scales of tiles [C, P, G]; zeros where they are still to be chosen."""
    scales_CPG = state.scales_CO.new_zeros(state.tile // state.run, len(pairs), group)
    for at, (tile, here) in enumerate(pairs if not state.is_aligned else ()):
        scales_CPG[: tile.stop - tile.start, at, : here.stop - here.start] = state.scales_CO[tile, here]
    return scales_CPG


def _best_scales(state: State, pairs: Sequence[tuple[slice, slice]], at: int, part_EPG: Tensor) -> Tensor:
    """Return the best scales of the blocks that begin at a column of each tile [P, G]."""
    size, count, group = part_EPG.shape
    weights_BE = None
    if state.weights_I is not None:
        weights_PE = part_EPG.new_ones(count, size)
        for number, (tile, _) in enumerate(pairs):
            known_E = state.weights_I[tile.start + at : tile.stop][:size]
            weights_PE[number, : len(known_E)] = known_E
        weights_BE = weights_PE.repeat_interleave(group, dim=0)
    blocks_BE = part_EPG.permute(1, 2, 0).reshape(-1, size).contiguous()
    return fitted(blocks_BE, state.codec, weights_BE).view(count, group)


def sweep(state: State, moment_II: Tensor, *, refits: bool) -> None:
    """Give each column the codes that are best given all others, and then each block of scales its best scales."""
    columns, left_IO, step = len(moment_II), state.left_IO, state.tile * WIDE
    for first in range(0, columns, step):
        wide = slice(first, min(first + step, columns))
        pull_JO = moment_II[wide] @ left_IO
        for start in range(wide.start, wide.stop, state.tile):
            tile = slice(start, min(start + state.tile, columns))
            here, later = slice(start - first, tile.stop - first), slice(tile.stop - first, None)
            moved_JO = _sweep_tile(state, tile, moment_II[tile, tile], pull_JO[here], refits=refits)
            pull_JO[later].addmm_(moment_II[tile.stop : wide.stop, tile], moved_JO, alpha=-1)


def _sweep_tile(state: State, tile: slice, own_JJ: Tensor, pull_JO: Tensor, *, refits: bool) -> Tensor:
    """Choose the codes of a tile, column by column, and then its scales; return what T - Q lost [J, O].

    Args:
        pull_JO: M (T - Q) at the tile; it is overwritten.
    """
    before_JO, target_JO = state.left_IO[tile].clone(), state.target_IO[tile]
    for first in range(tile.start, tile.stop, state.step):
        here = slice(first, min(first + state.step, tile.stop))
        inner = slice(first - tile.start, here.stop - tile.start)
        own_EE, old_EO = own_JJ[inner, inner], target_JO[inner] - before_JO[inner]
        given = (old_EO[:, None], pull_JO[inner, None], own_EE[:, :, None], state.scales_of(here)[:, None])
        codes_EPG, values_EPG = chosen(Columns(state.codec, *given, state.run, 1 / own_EE.diagonal()))
        state.codes_IO[here] = codes_EPG[:, 0]
        torch.sub(target_JO[inner], values_EPG[:, 0], out=state.left_IO[here])
        if refits or here.stop < tile.stop:
            pull_JO.addmm_(own_JJ[:, inner], values_EPG[:, 0] - old_EO, alpha=-1)
    if refits:
        _refit_scales(state, own_JJ, pull_JO, tile)
    return before_JO.sub_(state.left_IO[tile])


def _refit_scales(state: State, own_JJ: Tensor, pull_JO: Tensor, tile: slice) -> None:
    """Give the blocks of a tile their best scales for their codes, one after another.

    Args:
        pull_JO: M (T - Q) at the tile.
    """
    for column in range(tile.start, tile.stop, state.run):
        block, here = slice(column, column + state.run), slice(column - tile.start, column - tile.start + state.run)
        levels_EO, scale_O = state.levels_of(block), state.scales_CO[column // state.run]
        curve_O = (levels_EO * (own_JJ[here, here] @ levels_EO)).sum(dim=0)
        step_O = (levels_EO * pull_JO[here]).sum(dim=0) / curve_O.clamp(min=SMALLEST_SCALE)
        change_EO = levels_EO * step_O
        scale_O += step_O
        state.left_IO[block] -= change_EO
        pull_JO.addmm_(own_JJ[:, here], change_EO, alpha=-1)
