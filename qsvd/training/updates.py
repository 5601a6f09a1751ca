"""What surrounds an optimizer's step: preconditioned gradients before it, stochastic rounding after it.

Shape suffixes: O = out, I = in, K = rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qsvd.training.lora_rite import LoraRite

SHORT = 1 << 16  # bfloat16 is the upper half of a float32
PRIME = 1_000_003  # steps between two seeds with the same draws


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


class Rounding:
    """Steps of bfloat16 parameters, rounded stochastically (arXiv:2010.06192).

    A bfloat16 number has 8 bits. Rounded to the nearest, it never moves by steps below 2^-9 of it, as those of usual
    learning rates are for most components. Rounded up with the probability of the part that is cut off, it moves as far
    in the mean as in float32.

    AdamW makes its step from 0, where a bfloat16 number is as exact as the step: this depends on the parameter by its
    decay alone, which is computed here. LoRA-RITE computes in float32, and writes by `write`.

    Args:
        seed: Of the run. The draws depend on it and on the step: they are the same in all processes, and in a resumed
            run.
    """

    def __init__(self, seed: int, device: torch.device):
        self.seed, self.generator = seed, torch.Generator(device)
        self._before: list[tuple[nn.Parameter, Tensor, float]] = []

    @torch.no_grad()
    def before_step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Draw anew for this step, counted from 1; set bfloat16 parameters that have gradients to 0, and keep them."""
        self.generator.manual_seed((PRIME * self.seed + step) % 2**32)  # of which a CPU reads 32 bits
        if isinstance(optimizer, LoraRite):
            optimizer.write = self.write
            return
        for group in optimizer.param_groups:
            decay = 1 - group["lr"] * group["weight_decay"]
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.dtype == torch.bfloat16:
                    self._before.append((parameter, parameter.clone(), decay))
                    parameter.zero_()

    @torch.no_grad()
    def after_step(self) -> None:
        """Add the steps to the values."""
        while self._before:
            parameter, values, decay = self._before.pop()
            self.write(parameter, values.float().mul_(decay).add_(parameter))

    def write(self, parameter: Tensor, exact: Tensor) -> None:
        """Write float32 values into a parameter; the values are overwritten if it is in bfloat16."""
        if parameter.dtype == torch.bfloat16:
            bits = exact.contiguous().view(torch.int32)
            noise = torch.randint(SHORT, bits.shape, dtype=torch.int32, device=bits.device, generator=self.generator)
            exact = bits.add_(noise).bitwise_and_(-SHORT).view(torch.float32)
        parameter.copy_(exact)
