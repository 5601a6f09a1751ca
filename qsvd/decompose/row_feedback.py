"""Error feedback and coordinate descent where rows meet each other, too: tr(M_O E M_I E^T).

The rows are rounded in groups, each with feedback over its columns (feedback.py). Then the error of the group is moved
onto the rows that follow: with M_O = S S^T, S upper triangular, group g moves the rows of a later group l by
(S_gl S_ll^-1)^T E_g, so that they are at their best if they need not be rounded. It is error feedback against the
Kronecker product of both moments, but for the rows inside of a group.

Coordinate descent takes one column of some rows at a time. Rows that are changed at once meet each other, so that their
changes together can raise the error: it is computed, and such changes are not made. The scales of one block of columns
are refitted for all these rows at once. So no step raises the error.

Shape suffixes: O = out features, I = in features, G = rows worked on together, J = columns of a tile, E = elements of
one block.
"""

from itertools import accumulate, pairwise

import torch
from torch import Tensor

from qsvd.decompose.feedback import State, feed_back_groups, upper_factor
from qsvd.decompose.scales import inverse
from qsvd.numerics.codec import SMALLEST_SCALE

GROUP = 64  # rows rounded without feedback between them; with 128 the KL of the embedded model is 5 % higher
ROWS = {"cpu": 512, "cuda": 8192}  # of coordinate descent: a moment in the cache of a CPU; few launches on a GPU
PARTS = 4  # of these rows, changed one after another: 2 take two thirds of the time and leave up to 10 % more KL
RIDGE = 1e-6  # of the mean diagonal, where scales are refitted


def feed_back_rows(state: State, inputs_II: Tensor, outputs_OO: Tensor) -> None:
    """Round a matrix in groups of rows; the error of each is moved onto the later ones."""
    moves_OO = upper_factor(outputs_OO)
    for first in range(0, len(moves_OO), GROUP):
        here = slice(first, first + GROUP)
        moves_OO[:first, here] = torch.linalg.solve_triangular(
            moves_OO[here, here], moves_OO[:first, here], upper=True, left=False
        )
    feed_back_groups(state, inputs_II, moves_OO, GROUP)


def sweep_rows(state: State, inputs_II: Tensor, outputs_OO: Tensor, *, refits: bool) -> None:
    """Give each column of some rows the codes that are best given all others, and then each block its best scales."""
    columns, rows = state.target_IO.shape
    step = ROWS[outputs_OO.device.type]
    for first in range(0, rows, step):
        order_G = torch.arange(first, min(first + step, rows), device=outputs_OO.device)
        here_G = torch.cat([order_G[part::PARTS] for part in range(PARTS)])  # rows of a part lie side by side
        pull_IG = inputs_II @ (state.left_IO @ outputs_OO[:, here_G])
        part, own_GG = state.rows(here_G), outputs_OO[here_G[:, None], here_G]
        for start in range(0, columns, state.tile):
            tile = slice(start, min(start + state.tile, columns))
            moved_JG = _change_codes(part, tile, pull_IG[tile], inputs_II[tile, tile], own_GG)
            if refits:
                pull_IG[tile].addmm_(inputs_II[tile, tile].triu(1), moved_JG, alpha=-1)
                moved_JG += _refit_scales(part, tile, pull_IG[tile], inputs_II[tile, tile], own_GG)
            pull_IG[tile.stop :].addmm_(inputs_II[tile.stop :, tile], moved_JG, alpha=-1)
        state.put(here_G, part)


def _change_codes(part: State, tile: slice, pull_JG: Tensor, own_JJ: Tensor, own_GG: Tensor) -> Tensor:
    """Choose the codes of a tile, column by column; return the changes times M_O [J, G].

    Args:
        pull_JG: M_I (T - Q) M_O at the tile; it is kept up to date for the columns that follow.
    """
    moved_JG, levels_L = torch.empty_like(pull_JG), part.codec.levels(own_GG.device)
    between_L = (levels_L[:-1] + levels_L[1:]) / 2  # codes by bisection: columns of a part are short
    values_JG, codes_JG = part.target_IO[tile] - part.left_IO[tile], part.codes_IO[tile].int()
    ends = accumulate(len(range(first, len(own_GG), PARTS)) for first in range(PARTS))
    cuts = [slice(*pair) for pair in pairwise([0, *ends])]
    own_PG, reach_P = [own_GG[cut] for cut in cuts], [1 / own_GG.diagonal()[cut] for cut in cuts]
    scale_G = inverse_G = own_GG[0]  # of the block
    for at, column in enumerate(range(tile.start, tile.stop)):
        curve, slope_G, old_G = own_JJ[at, at], pull_JG[at] / own_JJ[at, at], values_JG[at]
        if at % part.run == 0:
            scale_G = part.scales_CO[column // part.run]
            inverse_G = inverse(scale_G)
        for cut, own_RG, reach_R in zip(cuts, own_PG, reach_P, strict=True):
            slope_R, old_R = slope_G[cut], old_G[cut]
            wanted_R = torch.addcmul(old_R, slope_R, reach_R).mul_(inverse_G[cut])
            codes_R = torch.bucketize(wanted_R, between_L, out_int32=True)
            values_R = levels_L.index_select(0, codes_R).mul_(scale_G[cut])
            change_R = values_R - old_R
            moved_G = change_R @ own_RG
            if float(change_R @ slope_R.sub(moved_G[cut], alpha=0.5)) > 0:
                old_R.copy_(values_R)
                codes_JG[at, cut] = codes_R
                slope_G -= moved_G
        torch.addcmul(pull_JG[at], slope_G, curve, value=-1, out=moved_JG[at]).div_(curve)
        torch.mul(slope_G, curve, out=pull_JG[at])
        pull_JG[at + 1 :].addr_(own_JJ[at + 1 :, at], moved_JG[at], alpha=-1)
    part.codes_IO[tile] = codes_JG.to(torch.uint8)
    torch.sub(part.target_IO[tile], values_JG, out=part.left_IO[tile])
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
        curve_GG.diagonal().add_(RIDGE * curve_GG.diagonal().mean() + SMALLEST_SCALE)
        root_GG, failed = torch.linalg.cholesky_ex(curve_GG)
        step_G = torch.where(failed == 0, torch.cholesky_solve(slope_G[:, None], root_GG)[:, 0], 0)
        scale_G += step_G
        change_EG = levels_EG * step_G
        part.left_IO[block] -= change_EG
        moved_EG = change_EG @ own_GG
        moved_JG[here] += moved_EG
        pull_JG.addmm_(own_JJ[:, here], moved_EG, alpha=-1)
    return moved_JG
