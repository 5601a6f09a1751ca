"""The average of the trained products of several runs, and the folder of `qsvd aggregate`.

Shape suffixes: O = out features, I = in features, R = stored rank, K = rank of the average.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qsvd.export.trained import ExportFolder, Trained
from qsvd.numerics.svd import product_svd


class AggregateFolder(ExportFolder):
    """The folder of one run of `qsvd aggregate`."""

    record = "qsvd_aggregate.json"
    command = "qsvd aggregate"


@dataclass(frozen=True)
class Average:
    """The average of what is trained of one weight, without the stored components: up_OK @ down_KI.

    Args:
        up_OK: U S, float32, with the singular values of the average.
        down_KI: V^T, float32, orthonormal rows.
        square: Squared Frobenius norm of the whole average.
        lost: That of the part that its rank leaves out.
    """

    up_OK: Tensor
    down_KI: Tensor
    square: float
    lost: float


def average(trained: Sequence[Trained], shares: Sequence[float], stored: tuple[Tensor, Tensor], rank: int) -> Average:
    """Return the best approximation of rank at most `rank` of sum_n share_n B_n A_n - B0 A0.

    The factors of all runs, side by side, are decomposed in float64 without a dense matrix. FedSVD (arXiv:2505.12805)
    averages B with one common A; here the products are averaged, so each run may have its own.

    Args:
        trained: The values of one weight in every run; gains and full matrices are left out.
        shares: One for every run; their sum is 1.
        stored: B0 [O, R] and A0 [R, I], which the product of each run contains.
    """
    up_OR, down_RI = (factor.double() for factor in stored)
    ups, downs, subtracted = list[Tensor](), list[Tensor](), 0.0
    for one, share in zip(trained, shares, strict=True):
        up_OK, down_KI = one.up_OK.double(), one.down_KI.double()
        kept = len(down_RI)
        if torch.equal(up_OK[:, :kept], up_OR) and torch.equal(down_KI[:kept], down_RI):  # they cancel to the bit
            up_OK, down_KI = up_OK[:, kept:], down_KI[kept:]
        else:
            subtracted += share
        ups.append(share * up_OK)
        downs.append(down_KI)
    if subtracted:
        ups.append(-subtracted * up_OR)
        downs.append(down_RI)
    found = product_svd(torch.cat(ups, dim=1), torch.cat(downs))
    squares = found.values_K.double().square()
    kept_up = (found.left_OK * found.values_K)[:, :rank]
    return Average(kept_up, found.right_KI[:rank], squares.sum().item(), squares[rank:].sum().item())
