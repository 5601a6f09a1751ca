"""The methods of the comparison by name, those of qsvd among them, and the errors of a split.

Shape suffixes: O = out features, I = in features, R = rank.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from splits import published
from splits.published import Method, Parts, Weight, finer
from torch import Tensor

from qsvd.decompose.alternate import Recipe, split_weight
from qsvd.decompose.moments import Moments
from qsvd.decompose.objective import PLAIN, Objective
from qsvd.numerics.codec import Codec
from qsvd.numerics.names import codec_named
from qsvd.options.quantizing import BEST_PASSES, FEEDBACK_PASSES, SWEEPS

CODECS = {4: "nf4", 3: "nf3-64-fp16", 2: "nf2-32-fp16"}
FEW = 2  # alternations with large matrices
Statistics = Literal["no data", "H", "H and G"]


@dataclass(frozen=True)
class Entry:
    """A method with its name in tables.

    Args:
        ranks: Whether it runs without components, with them, or both.
        has_finer_blocks: Whether its blocks have half the size.
    """

    name: str
    run: Method
    ranks: Literal["zero", "above zero", "all"] = "above zero"
    has_finer_blocks: bool = False

    def takes(self, rank: int) -> bool:
        """Whether the method runs at a rank."""
        return self.ranks == "all" or (self.ranks == "zero") == (rank == 0)

    def codec(self, bits: int) -> Codec:
        """Return the codec for a width."""
        found = codec_named(CODECS[bits])
        return finer(found) if self.has_finer_blocks else found


def ours(statistics: Statistics) -> Method:
    """Return qsvd's own split by error feedback, with the iterations of --quality good, or best (H and G)."""

    def run(weight: Weight, codec: Codec, rank: int) -> Parts:
        passes, sweeps = (BEST_PASSES, SWEEPS["best"]) if statistics == "H and G" else (FEEDBACK_PASSES, SWEEPS["good"])
        recipe = Recipe(codec, rank, iterations=passes, scales="mse", rounding="feedback", sweeps=sweeps)
        split = split_weight(weight.weight_OI.float(), recipe, objective=objective_of(weight, statistics))
        dtype = weight.weight_OI.dtype
        return split.residual.decode().to(dtype), split.up_OR.to(dtype), split.down_RI.to(dtype)

    return run


def objective_of(weight: Weight, statistics: Statistics) -> Objective | Moments:
    """Return qsvd's objective with no statistics, with H, or with H and G."""
    if statistics == "no data":
        return PLAIN
    outputs_OO = weight.outputs_OO.float() if statistics == "H and G" else None
    return Moments(weight.inputs_II.float(), outputs_OO)


def caldera_few(weight: Weight, codec: Codec, rank: int) -> Parts:
    """CALDERA with fewer alternations, for large matrices."""
    return published.caldera(weight, codec, rank, FEW)


OURS = (
    Entry("qsvd, no data", ours("no data"), "all"),
    Entry("qsvd, H", ours("H"), "all"),
    Entry("qsvd, H and G", ours("H and G"), "all"),
)
ENTRIES = (
    Entry("NF (QLoRA)", published.qlora, "zero"),
    Entry("NF, half the block size", published.qlora, "zero", has_finer_blocks=True),
    Entry("GPTQ", published.rounded_by_gptq, "zero"),
    Entry("LoftQ-5", published.loftq),
    Entry("QPiSSA-5", published.qpissa),
    Entry("LQ-LoRA, Fisher", published.lq_lora),
    Entry("QERA approximate", published.qera_approximate),
    Entry("QERA exact", published.qera_exact),
    Entry("CLoQ-like", published.cloq),
    Entry("CALDERA-like, 5", published.caldera),
    *OURS,
)
LARGE = ("NF (QLoRA)", "NF, half the block size", "QPiSSA-5", "QERA exact", "CLoQ-like")
ENTRIES_OF_LARGE = (
    *(entry for entry in ENTRIES if entry.name in LARGE),
    Entry("CALDERA-like, 2", caldera_few),
    *OURS,
)


@dataclass(frozen=True)
class Outcome:
    """What a method makes of a weight: W - Q - B A with B and A in 16 bits, its bytes, and seconds of the process."""

    error_OI: Tensor
    num_bytes: int
    seconds: float


def apply(entry: Entry, weight: Weight, bits: int, rank: int) -> Outcome:
    """Split a weight."""
    codec, started = entry.codec(bits), time.process_time()
    residual_OI, up_OR, down_RI = entry.run(weight, codec, rank)
    seconds = time.process_time() - started
    error_OI = weight.weight_OI - residual_OI
    if rank > 0:
        assert up_OR is not None, "above rank 0 all methods have components"
        assert down_RI is not None, "above rank 0 all methods have components"
        error_OI -= up_OR.bfloat16().to(error_OI.dtype) @ down_RI.bfloat16().to(error_OI.dtype)
    shape = (error_OI.shape[0], error_OI.shape[1])
    return Outcome(error_OI, codec.num_bytes(shape) + 2 * rank * sum(shape), seconds)


class Measure:
    """The relative errors of splits of one weight: the Frobenius norm, and for each text those of outputs and of loss.

    Args:
        weight_OI: W.
        moments: Name of a text -> H, G: sqrt(tr(E H E^T) / tr(W H W^T)), and the same with tr(G E H E^T).
    """

    def __init__(self, weight_OI: Tensor, moments: Mapping[str, tuple[Tensor, Tensor]]):
        self.moments = moments
        self.whole = self._squares(weight_OI)

    def errors(self, error_OI: Tensor) -> dict[str, float]:
        """Return the errors by name."""
        return {key: math.sqrt(max(value, 0) / self.whole[key]) for key, value in self._squares(error_OI).items()}

    def _squares(self, one_OI: Tensor) -> dict[str, float]:
        found = {"frobenius": _inner(one_OI, one_OI)}
        for name, (inputs_II, outputs_OO) in self.moments.items():
            moved_OI = one_OI @ inputs_II
            found[f"output {name}"] = _inner(moved_OI, one_OI)
            found[f"loss {name}"] = _inner(outputs_OO @ moved_OI, one_OI)
        return found


def _inner(left_OI: Tensor, right_OI: Tensor) -> float:
    return float((left_OI * right_OI).sum(dtype=torch.float64))
