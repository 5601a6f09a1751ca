"""What training changed in one weight, as a LoRA on the original weight, and the error that remains.

Trained is W' = Q + B A, started at W ~ Q + B0 A0. What training changed is B A - B0 A0 = [B | -B0] [A ; A0], of rank
K + R at most; on the original it gives W + B A - B0 A0, off W' by exactly the error that the split had, W - Q - B0 A0.

Shape suffixes: O = out features, I = in features, K = trained rank, R = stored rank, M = K + R or a shorter side,
S = rank of the difference.
"""

import json
from dataclasses import dataclass

import torch
from torch import Tensor

from qsvd.checkpoint.export import Trained
from qsvd.checkpoint.read_split import SplitFolder
from qsvd.numerics.error import frobenius
from qsvd.plan.listing import listing

ROUNDOFF = torch.finfo(torch.float32).eps  # rounding both factors to float32 moves a product by eps |B| |A| at most


@dataclass(frozen=True)
class LoraWeight:
    """What is left between one original weight with its LoRA and the trained one.

    Args:
        name: Of the tensor.
        rank: Of the difference; 0 where training changed nothing.
        error: ||W + dW - W'||_F.
        norm: ||W||_F.
    """

    name: str
    rank: int
    error: float
    norm: float

    @property
    def relative_error(self) -> float:
        return self.error / self.norm if self.norm else 0.0


def difference(trained: Trained, stored: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Balanced factors, float64 [O, S] and [S, I], of what training changed; S is its numerical rank.

    Singular values that a rounding of the factors to float32 could have made (Weyl's inequality) count as zero.

    Args:
        trained: B [O, K] and A [K, I].
        stored: B0 [O, R] and A0 [R, I] of any float dtype; None is R = 0.
    """
    left_OM, right_MI = trained.up_OK.double(), trained.down_KI.double()
    size = left_OM.norm() * right_MI.norm()
    if stored is not None:
        up_OR, down_RI = (factor.double() for factor in stored)
        size += up_OR.norm() * down_RI.norm()
        left_OM, right_MI = torch.cat((left_OM, -up_OR), dim=1), torch.cat((right_MI, down_RI))
    left_OM, left_core = torch.linalg.qr(left_OM)
    right_IM, right_core = torch.linalg.qr(right_MI.mT)
    left, values, right = torch.linalg.svd(left_core @ right_core.mT, full_matrices=False)
    rank = int((values > ROUNDOFF * size).sum())
    roots_S = values[:rank].sqrt()
    return left_OM @ (left[:, :rank] * roots_S), (right_IM @ (right[:rank].mT * roots_S)).mT


def measured(dense_OI: Tensor, weight_OI: Tensor, up_OS: Tensor, down_SI: Tensor) -> tuple[float, float]:
    """||W + dW - W'||_F and ||W||_F.

    Args:
        dense_OI: W', float32.
        weight_OI: W, of any float dtype.
        up_OS, down_SI: dW as it is written, rounded.
    """
    error_OI = dense_OI.neg().add_(weight_OI).addmm_(up_OS.float(), down_SI.float())
    return frobenius(error_OI), frobenius(weight_OI.float())


def recorded(split: SplitFolder) -> dict[str, tuple[float, float]]:
    """||W - Q - B0 A0||_F and ||W||_F of every split weight, as `qsvd quantize` measured them.

    Raises:
        ValueError: errors.jsonl is not there, is damaged or lacks a weight.
    """
    path = split.folder / "errors.jsonl"
    advice = "give the original model, on which the error can be measured"
    if not path.is_file():
        raise ValueError(f"{path} is not there; {advice}")
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        found = {line["name"]: (float(line["after"]["frobenius"]), float(line["weight_frobenius"])) for line in lines}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); {advice}") from error
    missing = [weight["module"] for weight in split.weights.values() if weight["module"] not in found]
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} weights ({listing(missing)}); {advice}")
    return {name: found[weight["module"]] for name, weight in split.weights.items()}
