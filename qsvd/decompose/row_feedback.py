"""Error feedback and coordinate descent where rows meet each other, too: tr(M_O E M_I E^T).

The rows are rounded in groups, each with feedback over its columns (feedback.py). Then the error of the group is moved
onto the rows that follow: with M_O^-1 = U^T U, U upper triangular, group g moves the later rows l by
-(U_gg^-1 U_gl)^T E_g, which is the best change for rows that need not be rounded. It is error feedback against the
Kronecker product of both moments, but for the rows inside of a group.

Coordinate descent takes one column of some rows at a time. Rows that are changed at once meet each other, so that their
changes together can raise the error: it is computed, and such changes are not made. The scales of one block of columns
are refitted for all these rows at once. So no step raises the error.

Shape suffixes: O = out features, I = in features, G = rows worked on together, J = columns of a tile, E = elements of
one block.
"""

import torch
from torch import Tensor

from qsvd.decompose.feedback import State, feed_back, upper_factor
from qsvd.decompose.scales import inverse
from qsvd.numerics.codec import SMALLEST_SCALE

GROUP = 64  # rows rounded without feedback between them; twice as many double the time saved and lose 5 %
ROWS = 512  # of coordinate descent, whose moment fits into the cache of a CPU
PARTS = 4  # of these rows, changed one after another; more parts are slower and hardly better
RIDGE = 1e-6  # of the mean diagonal, where scales are refitted


def feed_back_rows(state: State, inputs_II: Tensor, outputs_OO: Tensor) -> None:
    """Round a matrix in groups of rows; the error of each is moved onto the later ones."""
    upper_OO = upper_factor(outputs_OO)
    target_IO, rows = state.target_IO, len(outputs_OO)
    state.target_IO = target_IO.clone()
    for first in range(0, rows, GROUP):
        here, later = slice(first, first + GROUP), slice(first + GROUP, rows)
        part = state.rows(here)
        feed_back(part, inputs_II)
        state.put(here, part)
        if later.start < rows:
            move_GL = torch.linalg.solve_triangular(upper_OO[here, here], upper_OO[here, later], upper=True)
            state.target_IO[:, later].addmm_(part.left_IO, move_GL, alpha=-1)
    state.target_IO = target_IO
    state.set_scales(state.scales_in_order())  # computes what is left of the target as it was given


def sweep_rows(state: State, inputs_II: Tensor, outputs_OO: Tensor, *, refits: bool) -> None:
    """Give each column of some rows the codes that are best given all others, and then each block its best scales."""
    columns, rows = state.target_IO.shape
    for first in range(0, rows, ROWS):
        here = slice(first, min(first + ROWS, rows))
        pull_IG = inputs_II @ (state.left_IO @ outputs_OO[:, here])
        part, own_GG = state.rows(here), outputs_OO[here, here].contiguous()
        for start in range(0, columns, state.tile):
            tile = slice(start, min(start + state.tile, columns))
            moved_JG = _change_codes(part, tile, pull_IG[tile], inputs_II[tile, tile], own_GG)
            if refits:
                pull_IG[tile].addmm_(inputs_II[tile, tile].triu(1), moved_JG, alpha=-1)
                moved_JG += _refit_scales(part, tile, pull_IG[tile], inputs_II[tile, tile], own_GG)
            pull_IG[tile.stop :].addmm_(inputs_II[tile.stop :, tile], moved_JG, alpha=-1)
        state.put(here, part)


def _change_codes(part: State, tile: slice, pull_JG: Tensor, own_JJ: Tensor, own_GG: Tensor) -> Tensor:
    """Choose the codes of a tile, column by column; return the changes times M_O [J, G].

    Args:
        pull_JG: M_I (T - Q) M_O at the tile; it is kept up to date for the columns that follow.
    """
    moved_JG = torch.zeros_like(pull_JG)
    diagonal_G = own_GG.diagonal()
    for at, column in enumerate(range(tile.start, tile.stop)):
        curve = own_JJ[at, at]
        for first in range(PARTS):
            some = slice(first, None, PARTS)
            old_P = part.target_IO[column, some] - part.left_IO[column, some]
            pull_P, scale_P = pull_JG[at, some], part.scales_CO[column // part.run, some]
            wanted_P = torch.addcdiv(old_P, pull_P, diagonal_G[some] * curve)
            codes_P = part.codec.nearest(wanted_P * inverse(scale_P))
            change_P = part.codec.levels(scale_P.device)[codes_P.int()] * scale_P - old_P
            moved_G = own_GG[:, some] @ change_P
            lowers = 2 * (change_P @ pull_P) > curve * (change_P @ moved_G[some])
            moved_G *= lowers
            part.left_IO[column, some] -= change_P * lowers
            part.codes_IO[column, some] = torch.where(lowers, codes_P, part.codes_IO[column, some])
            pull_JG[at].sub_(moved_G * curve)
            moved_JG[at] += moved_G
        pull_JG[at + 1 :].addr_(own_JJ[at + 1 :, at], moved_JG[at], alpha=-1)
    return moved_JG


def _refit_scales(part: State, tile: slice, pull_JG: Tensor, own_JJ: Tensor, own_GG: Tensor) -> Tensor:
    """Give the blocks of a tile their best scales for their codes, those of all rows at once; return the changes times
    M_O [J, G]."""
    moved_JG = torch.zeros_like(pull_JG)
    for column in range(tile.start, tile.stop, part.run):
        block, here = slice(column, column + part.run), slice(column - tile.start, column - tile.start + part.run)
        levels_EG, scale_G = part.levels_of(block), part.scales_CO[column // part.run]
        curve_GG = own_GG * (levels_EG.mT @ (own_JJ[here, here] @ levels_EG))
        slope_G = (levels_EG * pull_JG[here]).sum(dim=0)
        ridged_GG = curve_GG.clone()
        ridged_GG.diagonal().add_(RIDGE * curve_GG.diagonal().mean() + SMALLEST_SCALE)
        root_GG, failed = torch.linalg.cholesky_ex(ridged_GG)
        step_G = torch.cholesky_solve(slope_G[:, None], root_GG)[:, 0]
        step_G = torch.where(part.codec.has_signed_scales | (scale_G + step_G > 0), step_G, 0)
        lowers = (2 * (step_G @ slope_G) > step_G @ curve_GG @ step_G) & (failed == 0)
        step_G = torch.where(lowers, step_G, 0)
        scale_G += step_G
        change_EG = levels_EG * step_G
        part.left_IO[block] -= change_EG
        moved_EG = change_EG @ own_GG
        moved_JG[here] += moved_EG
        pull_JG.addmm_(own_JJ[:, here], moved_EG, alpha=-1)
    return moved_JG
