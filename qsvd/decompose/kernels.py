"""The columns of a tile on CUDA in Triton, one kernel for all: columns.py, and row_feedback.py where rows meet.

A program keeps the changes of all columns of its rows in registers. For each column it adds up what the changes before
it moved, takes the nearest level by bisection, and writes code and value. Where rows meet, one program has all rows
that are changed at once, and the moment between them.

Shape suffixes: E = columns of the tile, R = rows of a program, S = the same rows again; P and G as in columns.py.
"""

import torch
import triton  # pyright: ignore[reportMissingImports]  # comes with torch where CUDA does
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from qsvd.decompose.columns import Columns
from qsvd.numerics.codec import Codec
from qsvd.numerics.kernels import launch

ROWS = 64  # of a program, where rows do not meet
LEAST_SIDE = 16  # of a block of registers
WARPS = 16  # of the program where rows meet


def chosen(columns: Columns) -> tuple[Tensor, Tensor]:
    """Return the codes, uint8, and what they decode to, float32 [E, P, G]."""
    before_EPG = columns.before_EPG.contiguous()
    width, count, height = before_EPG.shape
    codes_EPG = torch.empty(before_EPG.shape, dtype=torch.uint8, device=before_EPG.device)
    values_EPG = torch.empty_like(before_EPG)
    codec, reach_E = columns.codec, columns.reach_E
    levels_L, between_L = _levels(codec, before_EPG.device)
    given = (columns.pulls_EPG.contiguous(), columns.moves_EEP.contiguous(), columns.scales_CPG.contiguous())
    tensors = (codes_EPG, values_EPG, before_EPG, *given, levels_L if reach_E is None else reach_E, levels_L, between_L)
    programs = triton.cdiv(height, ROWS)
    kinds = {"BITS": codec.bits, "RUN": columns.run, "IS_SWEEP": int(reach_E is not None)}
    sides = {"WIDTH": max(triton.next_power_of_2(width), LEAST_SIDE), "ROWS": ROWS}
    launch(_columns, programs * count, (*tensors, width, count, height, programs), kinds | sides)
    return codes_EPG, values_EPG


def changed(
    codec: Codec, state: tuple[Tensor, Tensor, Tensor], pull_EG: Tensor, own_EE: Tensor, own_GG: Tensor
) -> Tensor:
    """Choose the codes of a tile where rows meet, with float32 scales; return the changes times M_O [E, G].

    Args:
        state: Values float32 and codes uint8 [E, G], contiguous, which are changed in place, and scales [E, G].
        pull_EG: M_I (T - Q) M_O at the tile.
    """
    values_EG, codes_EG, scales_EG = state
    width, height = values_EG.shape
    moved_EG = torch.zeros_like(values_EG)
    given = (pull_EG.contiguous(), own_EE.contiguous(), own_GG.contiguous(), scales_EG.contiguous())
    tensors = (codes_EG, values_EG, moved_EG, *given, *_levels(codec, values_EG.device))
    sides = {"WIDTH": triton.next_power_of_2(width), "ROWS": triton.next_power_of_2(height)}
    sides = {name: max(side, LEAST_SIDE) for name, side in sides.items()}
    launch(_meeting, 1, (*tensors, width, height), {"BITS": codec.bits, "num_warps": WARPS} | sides)
    return moved_EG


def _levels(codec: Codec, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the levels and the numbers half-way between them."""
    levels_L = codec.levels(device)
    return levels_L, (levels_L[:-1] + levels_L[1:]) / 2


@triton.jit
def _nearest(scaled, between, BITS: tl.constexpr):
    """Return the number of `between` that lie below each value."""
    code = tl.zeros(scaled.shape, tl.int32)
    for bit in tl.static_range(BITS - 1, -1, -1):
        code += tl.where(scaled > tl.load(between + code + ((1 << bit) - 1)), 1 << bit, 0)
    return code


@triton.jit
def _columns(  # noqa: PLR0913  # tensors are pointers here, each with its own argument
    codes,
    values,
    before,
    pulls,
    moves,
    scales,
    reach,
    levels,
    between,
    width,
    count,
    height,
    programs,
    BITS: tl.constexpr,
    RUN: tl.constexpr,
    IS_SWEEP: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Choose codes and values of one matrix's rows, column by column; `reach` is read in a sweep alone."""
    matrix = tl.program_id(0) // programs
    row_R = tl.program_id(0) % programs * ROWS + tl.arange(0, ROWS)
    is_in_R = row_R < height
    place_R, step = matrix * height + row_R, count * height
    column_E = tl.arange(0, WIDTH)
    change_ER = tl.zeros([WIDTH, ROWS], tl.float32)
    for at in range(width):
        move_E = tl.load(moves + (column_E * width + at) * count + matrix, mask=column_E < at, other=0)
        here_R = at * step + place_R
        pull_R = tl.load(pulls + here_R, mask=is_in_R, other=0) - tl.sum(move_E[:, None] * change_ER, axis=0)
        before_R = tl.load(before + here_R, mask=is_in_R, other=0)
        wanted_R = pull_R
        if IS_SWEEP:
            wanted_R = before_R + pull_R * tl.load(reach + at)
        scale_R = tl.load(scales + at // RUN * step + place_R, mask=is_in_R, other=0)
        inverse_R = tl.where(scale_R == 0, 0.0, 1 / tl.where(scale_R == 0, 1.0, scale_R))
        code_R = _nearest(wanted_R * inverse_R, between, BITS)
        value_R = tl.load(levels + code_R) * scale_R
        tl.store(codes + here_R, code_R.to(tl.uint8), mask=is_in_R)
        tl.store(values + here_R, value_R, mask=is_in_R)
        change_ER = tl.where((column_E == at)[:, None], (value_R - before_R)[None, :], change_ER)


@triton.jit
def _meeting(  # noqa: PLR0913  # as in _columns
    codes,
    values,
    moved,
    pulls,
    inputs,
    outputs,
    scales,
    levels,
    between,
    width,
    height,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Change the codes and values of all rows, column by column, where that lowers their common error."""
    row_R, column_E = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    is_in_R = row_R < height
    is_in_RS = is_in_R[:, None] & (row_R < height)[None, :]
    outputs_RS = tl.load(outputs + row_R[:, None] * height + row_R[None, :], mask=is_in_RS, other=0)
    own_R = tl.load(outputs + row_R * height + row_R, mask=is_in_R, other=1)
    moved_ER = tl.zeros([WIDTH, ROWS], tl.float32)
    for at in range(width):
        input_E = tl.load(inputs + at * width + column_E, mask=column_E < at, other=0)
        own = tl.load(inputs + at * width + at)
        here_R = at * height + row_R
        pull_R = tl.load(pulls + here_R, mask=is_in_R, other=0) - tl.sum(input_E[:, None] * moved_ER, axis=0)
        old_R = tl.load(values + here_R, mask=is_in_R, other=0)
        scale_R = tl.load(scales + here_R, mask=is_in_R, other=0)
        inverse_R = tl.where(scale_R == 0, 0.0, 1 / tl.where(scale_R == 0, 1.0, scale_R))
        code_R = _nearest((old_R + pull_R * (1 / (own * own_R))) * inverse_R, between, BITS)
        new_R = tl.load(levels + code_R) * scale_R
        change_R = tl.where(is_in_R, new_R - old_R, 0.0)
        move_S = tl.sum(change_R[:, None] * outputs_RS, axis=0)
        gain = tl.sum(change_R * (pull_R - move_S * (own / 2)), axis=0)
        old_code_R = tl.load(codes + here_R, mask=is_in_R, other=0)
        tl.store(codes + here_R, tl.where(gain > 0, code_R.to(tl.uint8), old_code_R), mask=is_in_R)
        tl.store(values + here_R, tl.where(gain > 0, new_R, old_R), mask=is_in_R)
        move_S = tl.where(gain > 0, move_S, 0.0)
        moved_ER = tl.where((column_E == at)[:, None], move_S[None, :], moved_ER)
    at_ER = column_E[:, None] * height + row_R[None, :]
    tl.store(moved + at_ER, moved_ER, mask=(column_E < width)[:, None] & is_in_R[None, :])
