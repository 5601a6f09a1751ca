"""x Q^T and y Q for a packed matrix Q, of which no more is decoded at a time than the product needs.

Shape suffixes: T = tokens, O = out features, I = in features, R = rows of a band.
"""

import torch
from torch import Tensor

from qsvd.numerics.codec import BAND, PackedBlocks


def times_transposed(x_TI: Tensor, packed: PackedBlocks) -> Tensor:
    """x Q^T [T, O] in the dtype of x, with no more of Q decoded than a band of rows."""
    y_TO = x_TI.new_empty(len(x_TI), packed.shape[0])
    for rows, band in packed.in_rows(BAND[x_TI.device.type]):
        torch.mm(x_TI, band.decode(dtype=x_TI.dtype).T, out=y_TO[:, rows])
    return y_TO


def times(y_TO: Tensor, packed: PackedBlocks) -> Tensor:
    """y Q [T, I] in the dtype of y, in bands of rows; in 16 bits all of Q at once, since sums of bands would be
    rounded one by one.
    """
    if y_TO.dtype.itemsize < 4:
        return y_TO @ packed.decode(dtype=y_TO.dtype)
    x_TI = y_TO.new_empty(len(y_TO), packed.shape[1])
    for rows, band in packed.in_rows(BAND[y_TO.device.type]):
        band_RI = band.decode(dtype=y_TO.dtype)
        torch.addmm(x_TI, y_TO[:, rows], band_RI, beta=1 if rows.start else 0, out=x_TI)  # 0: x is not read
    return x_TI
