"""Choose codes and scales so that what the factors cannot absorb is small; stock readers decode the result.

Nearest codes minimize the error of each number. Error feedback and coordinate descent (feedback.py) minimize the error
of whole rows, and with the second moment of the gradients (row_feedback.py) that of whole matrices.

**Deflation.** Factors that are fitted after the rounding remove the error in the span that they take. So the moments of
`Metric` leave it out: with inputs of second moment H = L L^T and the rows V of the current factors in the space of L,
orthonormal, M = L (I - V V^T) L^T + damping. The rounding puts its error where the factors remove it; that helps with
H = I, too.

Shape suffixes: O = out features, I = in features, B = blocks, E = elements of one block.
"""

from math import frexp

import torch
from torch import Tensor

from qsvd.decompose.feedback import State, feed_back, sweep
from qsvd.decompose.objective import Metric
from qsvd.decompose.row_feedback import feed_back_rows, sweep_rows
from qsvd.decompose.scales import in_blocks, inverse, runs_of, scales_of
from qsvd.numerics.codec import Codec, PackedBlocks, plain_scales

DAMPING = {2: 0.1, 3: 0.03, 4: 0.01, 8: 0.01}  # bits -> share of the mean of a moment's diagonal that is added to it

MOST_EXPONENT = 120  # of a unit that float32 can be divided by


def round_nearest(matrix_OI: Tensor, codec: Codec, columns_I: Tensor | None = None) -> PackedBlocks:
    """Encode a matrix by nearest codes, with the scales of least squared error instead of the largest magnitudes.

    Args:
        matrix_OI: float32 [O, I], finite.
        columns_I: float32 [I], weights of the squared errors of each column; None is 1.
    """
    shape = (matrix_OI.shape[0], matrix_OI.shape[1])
    blocks_BE = in_blocks(matrix_OI.reshape(-1), codec.block_size)
    scales = codec.stored_scales(scales_of(blocks_BE, codec, columns_I, shape[1]))
    inverse_B = inverse(plain_scales(scales).float())
    codes_BE = torch.empty(blocks_BE.shape, dtype=torch.uint8, device=blocks_BE.device)
    for run in runs_of(blocks_BE):
        scaled_BE = blocks_BE[run] * inverse_B[run, None]
        codes_BE[run] = codec.nearest(scaled_BE.view(-1)).view(scaled_BE.shape)
    return codec.packed(codes_BE.view(-1)[: matrix_OI.numel()], scales, shape)


def round_with_feedback(target_OI: Tensor, codec: Codec, metric: Metric, *, sweeps: int = 1) -> PackedBlocks:
    """Encode a matrix with error feedback against what factors cannot absorb, and sweeps of coordinate descent.

    Where that leads to scales that cannot be stored, codes are the nearest ones.

    Args:
        target_OI: float32 [O, I], finite: W - B A.
        metric: The error that is lowered.
        sweeps: At least 1.
    """
    state = State.start(target_OI, codec, metric.columns_I)
    unit = _unit(state.target_IO)  # squares of very large and very small numbers are no float32
    for part in (state.target_IO, state.scales_CO):
        part /= unit
    if metric.outputs_OO is None:
        feed_back(state, metric.inputs_II)
    else:
        feed_back_rows(state, metric.inputs_II, metric.outputs_OO)
    refits = state.is_aligned and codec.nested is None  # nested scales, once refitted and rounded, gain nothing
    for _ in range(sweeps if refits else 0):
        _sweep(state, metric, refits=True)
    scales_B = state.scales_in_order() * unit
    if not (scales_B.abs() <= torch.finfo(codec.scale_dtype).max).all():  # nor is a NaN
        return round_nearest(target_OI, codec, metric.columns_I)
    stored = codec.stored_scales(scales_B)
    is_rounded = state.set_scales(plain_scales(stored).float() / unit)
    for _ in range(int(is_rounded) if refits else sweeps):  # codes for the scales as they are stored
        _sweep(state, metric, refits=False)
    return codec.packed(state.codes_IO.t().reshape(-1), stored, (target_OI.shape[0], target_OI.shape[1]))


def _unit(matrix: Tensor) -> float:
    """Return a power of two near the largest magnitude; 1 for zeros."""
    _, exponent = frexp(float(matrix.abs().amax()))
    return 2.0 ** max(min(exponent, MOST_EXPONENT), -MOST_EXPONENT)


def _sweep(state: State, metric: Metric, *, refits: bool) -> None:
    """Make one sweep of coordinate descent."""
    if metric.outputs_OO is None:
        sweep(state, metric.inputs_II, refits=refits)
    else:
        sweep_rows(state, metric.inputs_II, metric.outputs_OO, refits=refits)
