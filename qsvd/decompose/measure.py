"""What quantization cost one weight: plain quantization before, the split after."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qsvd.decompose.split import Split
from qsvd.numerics.error import Norms, frobenius, norms


@dataclass(frozen=True)
class WeightError:
    """The error of one weight W [out, in]: of codec(W) before, of the stored split after.

    bits counts all that is stored for the split, factors included, per element of W.
    weight_frobenius is ||W||_F, by which a Frobenius error becomes relative.
    """

    name: str
    role: str
    shape: tuple[int, int]
    rank: int
    bits: float
    iteration: int
    weight_frobenius: float
    before: Norms
    after: Norms


def measure(weight_OI: Tensor, split: Split, *, name: str, role: str, seed: int = 0) -> WeightError:
    """Both errors of one weight, by the same codec: codec(W) alone, and the split.

    Args:
        weight_OI: [O, I], float32 or a 16-bit float, on the split's device.
        seed: Of the probes that estimate a large matrix's nuclear norm.
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
