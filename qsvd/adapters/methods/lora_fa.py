"""LoRA-FA: LoRA with A frozen. Shape suffixes as in adapter.py."""

import torch
from torch import Tensor, nn

from qsvd.adapters.adapter import AdapterOptions, Defaults, StoredWeight
from qsvd.adapters.methods.added import Added, kaiming
from qsvd.adapters.methods.refactor import Refactor, RefactorOptions
from qsvd.numerics.svd import product_svd
from qsvd.plan.tensors import AdapterTensors, TensorShape


class LoraFa(Added):
    """LoRA-FA (arXiv:2308.03303): W' = Q + B0 A0 + (alpha / K) B A, with B trained from 0 and A random and frozen.

    The backward pass needs x A^T [T, K] and no x. Parameters: K O. A0 and A are one tensor, in the dtype of the
    components. With --refactor-every the second factor is T A, with a frozen T [K, K] that is saved: A keeps the rows
    that its seed gives, and T makes them orthonormal.
    """

    paper = "2308.03303"
    starts_as = "zero, added"
    defaults = Defaults(
        rank=64, scale=16 / 64, learning_rate=2e-4, reason="those of lora: B moves as it does there in its first steps"
    )
    options = RefactorOptions
    hooks = Refactor
    shared_options = ("rslora",)

    def __init__(
        self, stored: StoredWeight, up_OK: Tensor, down_KI: Tensor, *, scale: float, refactor_every: int | None
    ):
        super().__init__(stored, scale=scale)
        self.stored_rank, self.refactor_every = stored.rank, refactor_every
        self.up = nn.Parameter(up_OK)
        both = torch.cat((stored.down_RI, down_KI.to(stored.down_RI)))
        self.register_buffer("frozen_down", both, persistent=False)
        if refactor_every is not None:
            self.register_buffer("turn", torch.eye(len(down_KI), dtype=up_OK.dtype, device=up_OK.device))

    @classmethod
    def start(cls, stored: StoredWeight, options: AdapterOptions, generator: torch.Generator) -> "LoraFa":
        rank, scale = cls.size(stored, options)
        out_features, in_features = stored.residual.shape
        up_OK = torch.zeros(out_features, rank, dtype=options.torch_dtype, device=stored.up_OR.device)
        down_KI, every = kaiming(rank, in_features, generator), cls.own(options).refactor_every
        return cls(stored, up_OK, down_KI, scale=scale, refactor_every=every)

    @classmethod
    def tensors(
        cls, shape: tuple[int, int], stored_rank: int, rank: int, dtype: torch.dtype, stored_dtype: torch.dtype
    ) -> AdapterTensors:
        (rows, columns), rank = shape, min(rank, *shape)
        both = stored_rank + rank
        return AdapterTensors(
            parameters={"up": TensorShape((rows, rank), dtype)},
            buffers={
                "frozen_up": TensorShape((rows, stored_rank), stored_dtype),
                "frozen_down": TensorShape((both, columns), stored_dtype),
            },
            made={"up": TensorShape((rows, both), dtype)},
        )

    def added(self) -> tuple[Tensor, Tensor]:
        return self.scale * self._turned(), self.get_buffer("frozen_down")[self.stored_rank :]

    def factors(self) -> tuple[Tensor, Tensor]:
        up_OK, frozen_up = self.scale * self._turned(), self.get_buffer("frozen_up")
        if self.stored_rank:
            up_OK = torch.cat((frozen_up.to(up_OK), up_OK), dim=1)
        return up_OK, self.get_buffer("frozen_down")

    def _turned(self) -> Tensor:
        """Return B, or B T, [O, K]."""
        return self.up if self.refactor_every is None else self.up @ self.get_buffer("turn")

    def refactor(self) -> list[nn.Parameter]:
        down_KI = self.get_buffer("frozen_down")[self.stored_rank :]
        found = product_svd(self._turned(), down_KI)
        self.up.copy_(found.left_OK * found.values_K)
        # T A = V^T, solved in the rows of A
        rows_KI = down_KI.double()
        turn_KK = torch.linalg.solve(rows_KI @ rows_KI.T, rows_KI @ found.right_KI.double().T).T
        self.turn = turn_KK.to(self.up.dtype)
        return [self.up]


METHOD = LoraFa
