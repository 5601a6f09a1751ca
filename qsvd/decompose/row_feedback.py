"""Error feedback and coordinate descent where rows meet each other, too: tr(M_O E M_I E^T).

The rows are rounded in groups, each with feedback over its columns (feedback.py). Then the error of the group is moved
onto the rows that follow: with M_O = S S^T, S upper triangular, group g moves the rows of a later group l by
(S_gl S_ll^-1)^T E_g, so that they are at their best if they need not be rounded. It is error feedback against the
Kronecker product of both moments, but for the rows inside of a group.

Coordinate descent takes one column of a group of rows at a time, and refits the scales of a block of columns for all
rows of the group at once. Rows that are changed at once meet each other, so that their changes together can raise the
error: it is computed, and such changes are not made. So no step raises the error.

Shape suffixes: O = out features, I = in features, G = rows of a group, J = columns of a tile, E = elements of one
block, L = levels.
"""

from math import ceil
from typing import Any

import numpy
import torch
from torch import Tensor

from qsvd.decompose.feedback import State, feed_back_groups, kernels_for, upper_factor
from qsvd.decompose.scales import inverse
from qsvd.numerics.codec import SMALLEST_SCALE

GROUP = 64  # rows rounded without feedback between them; with 128 the KL of the embedded model is 5 % higher
CHANGED = 128  # most rows that coordinate descent changes at once: a kernel holds the moment between them in registers
CHANGED_BY_TORCH = 2048  # on a GPU without kernels, where every column takes as many launches for few rows as for many
PARTS = 4  # least number of groups of coordinate descent: 2 leave up to 10 % more KL
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
    """Give each column of a group of rows the codes that are best given all others, and then each block its best
    scales."""
    columns, rows = state.target_IO.shape
    is_slow = outputs_OO.is_cuda and kernels_for(outputs_OO) is None
    count = max(PARTS, ceil(rows / (CHANGED_BY_TORCH if is_slow else CHANGED)))
    for number in range(min(count, rows)):
        rows_G = torch.arange(number, rows, count, device=outputs_OO.device)
        part, own_GG = state.rows(rows_G), outputs_OO[rows_G[:, None], rows_G]
        moved_IG = state.left_IO @ outputs_OO[:, rows_G]  # (T - Q) M_O, kept up to date
        for first in range(0, columns, state.tile):
            tile = slice(first, min(first + state.tile, columns))
            pull_JG, own_JJ = inputs_II[tile] @ moved_IG, inputs_II[tile, tile]
            change_JG = _change_codes(part, tile, pull_JG, own_JJ, own_GG)
            moved_IG[tile] -= change_JG
            if refits:
                pull_JG.addmm_(own_JJ, change_JG, alpha=-1)
                moved_IG[tile] -= _refit_scales(part, tile, pull_JG, own_JJ, own_GG)
        state.put(rows_G, part)


def _change_codes(part: State, tile: slice, pull_JG: Tensor, own_JJ: Tensor, own_GG: Tensor) -> Tensor:
    """Choose the codes of a tile, column by column; return the changes times M_O [J, G].

    Args:
        pull_JG: M_I (T - Q) M_O at the tile.
    """
    levels_L, run, kernels = part.codec.levels(own_GG.device), part.run, kernels_for(own_GG)
    scales_JG = part.scales_of(tile).repeat_interleave(run, dim=0)
    values_JG, codes_JG = part.target_IO[tile] - part.left_IO[tile], part.codes_IO[tile]
    if kernels is not None:
        moved_JG = kernels.changed(part.codec, (values_JG, codes_JG, scales_JG), pull_JG, own_JJ, own_GG)
        torch.sub(part.target_IO[tile], values_JG, out=part.left_IO[tile])
        return moved_JG
    reach_JG = 1 / torch.outer(own_JJ.diagonal(), own_GG.diagonal())
    moved_JG = torch.zeros_like(pull_JG)
    tensors = (
        levels_L,
        scales_JG,
        inverse(scales_JG),
        values_JG,
        codes_JG,
        reach_JG,
        moved_JG,
        pull_JG,
        own_JJ,
        own_GG,
    )
    levels, scales, inverses, values, codes, reach, moved, pulls, inputs, outputs = map(_quick, tensors)
    between = (levels[:-1] + levels[1:]) / 2
    for at in range(len(values)):
        old, pull = values[at], pulls[at] - inputs[at, :at] @ moved[:at]
        found = _search(between, (old + pull * reach[at]) * inverses[at])
        new = levels[found] * scales[at]
        moved[at] = (new - old) @ outputs
        if (new - old) @ (pull - moved[at] * (inputs[at, at] / 2)) > 0:
            values[at], codes[at] = new, found
        else:
            moved[at] = 0
    torch.sub(part.target_IO[tile], values_JG, out=part.left_IO[tile])
    return moved_JG


def _quick(tensor: Tensor) -> Any:
    """Return a tensor on a GPU, else the same numbers in NumPy, whose small operations take a quarter of the time."""
    return tensor if tensor.is_cuda else tensor.numpy()


def _search(between: Any, wanted: Any) -> Any:
    return between.searchsorted(wanted) if isinstance(wanted, numpy.ndarray) else torch.searchsorted(between, wanted)


def _refit_scales(part: State, tile: slice, pull_JG: Tensor, own_JJ: Tensor, own_GG: Tensor) -> Tensor:
    """Give the blocks of a tile their best scales for their codes, those of all rows at once; return the changes times
    M_O [J, G].

    Args:
        pull_JG: M_I (T - Q) M_O at the tile; it is kept up to date.
    """
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
        torch.mm(change_EG, own_GG, out=moved_JG[here])
        pull_JG.addmm_(own_JJ[:, here], moved_JG[here], alpha=-1)
    return moved_JG
