"""The gradient of ||P P^T - I||_F, the orthonormality loss of AdaLoRA and SORSA.

Both papers square the norm; both authors' codes do not, and neither do we. At P P^T = I, where the norm has no
gradient, it is 0.
"""

import torch
from torch import Tensor, nn

TINY = 1e-12  # below any norm that float32 products round to


def orthonormal_gradient(rows_KI: Tensor) -> Tensor:
    """Return 2 (P P^T - I) P / ||P P^T - I||_F, float32 [K, I]."""
    rows_KI = rows_KI.float()
    gap_KK = rows_KI @ rows_KI.T
    gap_KK.diagonal().sub_(1)
    return 2 * gap_KK @ rows_KI / (torch.linalg.matrix_norm(gap_KK) + TINY)


def add_gradient(parameter: nn.Parameter, weight: float, *, columns: bool = False) -> None:
    """Add `weight` times the gradient of the loss of a trained factor to its own; `columns` for those of U."""
    if parameter.grad is None:
        return
    matrix = parameter.detach()
    found = orthonormal_gradient(matrix.T).T if columns else orthonormal_gradient(matrix)
    parameter.grad.add_(found.to(parameter.grad.dtype), alpha=weight)
