"""Riemannian preconditioning of the gradients of pairs of factors. Shape suffixes: O = out, I = in, K = rank."""

from collections.abc import Sequence

import torch
from torch import nn


class Riemannian:
    """Riemannian preconditioned LoRA (arXiv:2402.02347): gA <- (B^T B + d I)^-1 gA, gB <- gB (A A^T + d I)^-1.

    Both use the factors before the step. It rewrites `.grad` and keeps nothing, so every optimizer can follow. It
    computes in float32, or in float64 for such factors.

    Args:
        pairs: The trained factors B [O, K] and A [K, I].
        damping: d.
    """

    def __init__(self, pairs: Sequence[tuple[nn.Parameter, nn.Parameter]], damping: float):
        self.pairs, self.damping = pairs, damping

    @torch.no_grad()
    def transform_grads(self) -> None:
        """Rewrite the gradients of all pairs."""
        for up, down in self.pairs:
            if up.grad is None or down.grad is None:
                continue  # an expert without tokens
            exact = torch.promote_types(up.dtype, torch.float32)
            up_OK, down_KI = up.to(exact), down.to(exact)
            damping_KK = self.damping * torch.eye(len(down_KI), dtype=exact, device=down.device)
            down.grad.copy_(torch.linalg.solve(up_OK.T @ up_OK + damping_KK, down.grad.to(exact)))
            up.grad.copy_(torch.linalg.solve(down_KI @ down_KI.T + damping_KK, up.grad.to(exact), left=False))
