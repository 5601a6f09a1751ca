"""Leading singular vectors of the gradient of the mean loss of all examples, for LoRA-GA (arXiv:2407.05000).

The gradients of one block are summed in memory; when its last example is done, only their singular vectors are kept.

Shape suffixes: O = out features, I = in features, K = rank that can be trained.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qsvd.errors import BadInput
from qsvd.files.statistics import LEFT, RIGHT, VALUES, most_rank
from qsvd.numerics.svd import randomized_svd
from qsvd.plan.weights import WeightSpec

PASSES = 6  # over a gradient and its transpose; torch.svd_lowrank(niter=4), which the authors use, makes 5


@dataclass
class GradientSums:
    """The summed gradients of the block that is being done.

    Args:
        rank: K. 2 K left and K right singular vectors are kept, fewer for a weight with a side below 2 K.
        seed: Of the sketches of large gradients.
        experts: Modules that are left out.
    """

    rank: int
    seed: int
    experts: frozenset[str]
    _open: dict[str, Tensor] = field(default_factory=dict)

    def add(self, module: str, gradient_OI: Tensor) -> None:
        """Add the gradient of the loss of one example with respect to one weight."""
        if module in self.experts:
            return
        exact_OI = gradient_OI.float()
        if module in self._open:
            self._open[module] += exact_OI
        else:
            self._open[module] = exact_OI.clone() if exact_OI is gradient_OI else exact_OI

    def close(self, weights: Iterable[WeightSpec], count: int) -> Mapping[str, Tensor]:
        """Return the singular vectors of the mean gradients of these weights of a block, and forget the gradients.

        Args:
            count: Number of examples.

        Raises:
            BadInput: a gradient has a NaN or an infinity.
        """
        found: dict[str, Tensor] = {}
        for spec in weights:
            sum_OI = self._open.pop(spec.module, None)
            rank = most_rank(self.rank, spec.shape)
            if rank and spec.module not in self.experts:
                mean_OI = torch.zeros(spec.shape) if sum_OI is None else sum_OI / count
                found |= self._vectors(spec.module, mean_OI, rank)
        self._open.clear()
        return found

    def _vectors(self, module: str, mean_OI: Tensor, rank: int) -> Mapping[str, Tensor]:
        if not mean_OI.isfinite().all():
            raise BadInput(f"the gradient of {module} has a NaN or an infinity; give --dtype float32")
        digest = hashlib.sha256(f"{self.seed} {module}".encode()).digest()
        generator = torch.Generator(mean_OI.device).manual_seed(int.from_bytes(digest[:6]))
        top = randomized_svd(mean_OI, 2 * rank, passes=PASSES, generator=generator)
        parts = {LEFT: top.left_OK[:, : 2 * rank], VALUES: top.values_K[: 2 * rank], RIGHT: top.right_KI[:rank]}
        return {f"{module}.{part}": tensor.contiguous() for part, tensor in parts.items()}
