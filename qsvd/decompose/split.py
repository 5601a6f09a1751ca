"""A weight split into a quantized residual and principal factors, W ~ Q + B A, and the errors before and after.

Shape suffixes: S = matrices of a stack, O = out features, I = in features, R = rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qsvd.numerics.codec import PackedBlocks
from qsvd.numerics.norms import norms_of, squares
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

    def dense(self) -> Tensor:
        """Return Q + B A, float32 [O, I]."""
        return self.residual.decode().addmm_(self.up_OR.float(), self.down_RI.float())

    def error(self, weight_OI: Tensor, out_OI: Tensor | None = None) -> Tensor:
        """Return W - Q - B A, float32 [O, I], for a float32 W; in `out_OI` if it is given."""
        error_OI = self.residual.decode(out=out_OI)
        error_OI.neg_().add_(weight_OI)
        return error_OI.addmm_(self.up_OR.float(), self.down_RI.float(), alpha=-1)


def measure(weight_OI: Tensor, split: Split, *, name: str, role: str, seed: int = 0) -> WeightError:
    """Measure both errors of one weight with the same codec: of codec(W) alone, and of the split.

    Args:
        weight_OI: [O, I], float32 or a 16-bit float, on the split's device.
        seed: Seed of the probes that estimate the nuclear norm of a large matrix.
    """
    return measure_stack(weight_OI[None], [split], names=[name], role=role, seeds=[seed])[0]


def measure_stack(
    weights_SOI: Tensor, splits: Sequence[Split], *, names: Sequence[str], role: str, seeds: Sequence[int]
) -> list[WeightError]:
    """Measure a stack of weights as `measure` does."""
    generators = [torch.Generator(weights_SOI.device).manual_seed(seed) for seed in seeds]
    weights_SOI = weights_SOI.float()
    errors_SOI = torch.empty_like(weights_SOI)
    for split, weight_OI, error_OI in zip(splits, weights_SOI, errors_SOI, strict=True):
        split.residual.codec.encode(weight_OI).decode(out=error_OI)
    before = norms_of(errors_SOI.neg_().add_(weights_SOI), generators)
    for split, weight_OI, error_OI in zip(splits, weights_SOI, errors_SOI, strict=True):
        split.error(weight_OI, out_OI=error_OI)
    after, whole = norms_of(errors_SOI, generators), squares(weights_SOI).sqrt().tolist()
    return [
        WeightError(
            name=name,
            role=role,
            shape=split.residual.shape,
            rank=split.rank,
            bits=8 * split.num_bytes / weights_SOI[0].numel(),
            iteration=split.iteration,
            weight_frobenius=whole[number],
            before=before[number],
            after=after[number],
        )
        for number, (name, split) in enumerate(zip(names, splits, strict=True))
    ]
