"""PiSSA: train the principal factors themselves (arXiv:2404.02948, section 3; on a quantized residual: QPiSSA).

The factors are the stored ones, whichever loop fitted them, so LoftQ's and LQ-LoRA's splits are trained alike.
Shape suffixes as in adapter.py.
"""

import torch
from torch import Tensor, nn

from qsvd.adapters.adapter import Adapter, AdapterOptions, Defaults, Principal
from qsvd.plan.tensors import AdapterTensors, TensorShape


class Pissa(Adapter):
    """W' = Q + B A, with B and A trained from where `qsvd quantize` put them. Parameters: R (O + I)."""

    defaults = Defaults(
        rank=None,
        alpha=None,
        learning_rate=2e-5,
        reason="the authors' rate; large principal values make the loss sharper than LoRA's, so the rate is smaller",
    )

    def __init__(self, up_OR: Tensor, down_RI: Tensor):
        super().__init__()
        self.up = nn.Parameter(up_OR)
        self.down = nn.Parameter(down_RI)

    @classmethod
    def start(cls, principal: Principal, options: AdapterOptions, generator: torch.Generator) -> "Pissa":
        del generator  # nothing is drawn
        if principal.rank == 0:
            raise ValueError(
                "pissa trains stored principal components, and this base has none (rank 0); "
                "quantize with --rank above 0, or train with --method lora"
            )
        if options.rank not in (None, principal.rank):
            raise ValueError(
                f"rank {options.rank} is not the stored rank {principal.rank}, the only one that pissa can train; "
                "leave the rank out, or quantize with another one"
            )
        if options.alpha not in (None, principal.rank):
            raise ValueError(
                f"alpha {options.alpha:g} would scale the stored components; with pissa it is the rank "
                f"{principal.rank}: leave it out"
            )
        return cls(*(factor.to(options.torch_dtype, copy=True) for factor in (principal.up_OR, principal.down_RI)))

    @classmethod
    def tensors(
        cls, shape: tuple[int, int], stored_rank: int, rank: int, dtype: torch.dtype, stored_dtype: torch.dtype
    ) -> AdapterTensors:
        del stored_rank, stored_dtype  # the stored factors are the trained ones, in another dtype
        parameters = {"up": TensorShape((shape[0], rank), dtype), "down": TensorShape((rank, shape[1]), dtype)}
        return AdapterTensors(parameters, buffers={}, made={})

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.up, self.down
