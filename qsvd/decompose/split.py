"""A weight split into a quantized residual and principal factors, W ~ Q + B A, and the errors before and after.

Shape suffixes: O = out features, I = in features, R = rank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qsvd.numerics.codec import PackedBlocks
from qsvd.numerics.norms import frobenius, norms
from qsvd.records import WeightError


@dataclass(frozen=True)
class Split:
    """W [O, I] ~ residual + up_OR @ down_RI, as it is stored.

    Args:
        residual: Q, quantized.
        up_OR: B of LoRA, in the dtype of the adapter; the scale alpha / r is 1.
        down_RI: A of LoRA.
        iteration: The pass of the loop that made it, from 1.
        history: ||W - Q - B A||_F after every pass, also after discarded ones. With a weighted objective in its norm,
            and the plain split that the loop starts from comes first.
    """

    residual: PackedBlocks
    up_OR: Tensor
    down_RI: Tensor
    iteration: int
    history: tuple[float, ...]

    @property
    def rank(self) -> int:
        return self.up_OR.shape[1]

    @property
    def num_bytes(self) -> int:
        return self.residual.num_bytes + self.up_OR.nbytes + self.down_RI.nbytes

    def error(self, weight_OI: Tensor) -> Tensor:
        """Return W - Q - B A, float32 [O, I], for a float32 W."""
        error_OI = self.residual.decode()
        error_OI.neg_().add_(weight_OI)
        return error_OI.addmm_(self.up_OR.float(), self.down_RI.float(), alpha=-1)


def measure(weight_OI: Tensor, split: Split, *, name: str, role: str, seed: int = 0) -> WeightError:
    """Measure both errors of one weight with the same codec: of codec(W) alone, and of the split.

    Args:
        weight_OI: [O, I], float32 or a 16-bit float, on the split's device.
        seed: Seed of the probes that estimate the nuclear norm of a large matrix.
    """
    generator = torch.Generator(weight_OI.device).manual_seed(seed)
    weight_OI = weight_OI.float()
    plain_OI = split.residual.codec.encode(weight_OI).decode()
    before = norms(plain_OI.neg_().add_(weight_OI), generator)
    del plain_OI
    return WeightError(
        name=name,
        role=role,
        shape=split.residual.shape,
        rank=split.rank,
        bits=8 * split.num_bytes / weight_OI.numel(),
        iteration=split.iteration,
        weight_frobenius=frobenius(weight_OI),
        before=before,
        after=norms(split.error(weight_OI), generator),
    )
