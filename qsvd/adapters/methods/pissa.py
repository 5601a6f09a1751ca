"""PiSSA: the stored components are trained. Shape suffixes as in adapter.py."""

import torch
from torch import Tensor, nn

from qsvd.adapters.adapter import Adapter, AdapterOptions, Defaults, StoredWeight, no_components
from qsvd.errors import BadInput
from qsvd.plan.tensors import AdapterTensors, TensorShape


class Pissa(Adapter):
    """PiSSA (arXiv:2404.02948, section 3): W' = Q + B A, with the components B and A trained. Parameters: R (O + I).

    Components of every loop (QPiSSA, LoftQ, LQ-LoRA) are trained alike.
    """

    paper = "arXiv:2404.02948"
    starts_as = "the stored components"
    defaults = Defaults(
        rank=None,
        scale=1.0,
        learning_rate=2e-5,
        reason="the authors' rate; large singular values make the loss sharper than LoRA's, so it is smaller",
    )
    needs_components = True

    def __init__(self, up_OR: Tensor, down_RI: Tensor):
        super().__init__()
        self.up = nn.Parameter(up_OR)
        self.down = nn.Parameter(down_RI)

    @classmethod
    def start(cls, stored: StoredWeight, options: AdapterOptions, generator: torch.Generator) -> "Pissa":
        del generator  # nothing is drawn
        if stored.rank == 0:
            raise no_components("pissa")
        if options.rank not in (None, stored.rank):
            raise BadInput(
                f"rank {options.rank} is not the stored rank {stored.rank}, the only one that pissa can train; "
                "leave out --rank, quantize with another --rank, or give --method lora"
            )
        if options.alpha not in (None, stored.rank):
            raise BadInput(
                f"alpha {options.alpha:g} would scale the stored components; with pissa it is the rank "
                f"{stored.rank}: leave it out"
            )
        return cls(*(factor.to(options.torch_dtype, copy=True) for factor in (stored.up_OR, stored.down_RI)))

    @classmethod
    def tensors(
        cls, shape: tuple[int, int], stored_rank: int, rank: int, dtype: torch.dtype, stored_dtype: torch.dtype
    ) -> AdapterTensors:
        del stored_rank, stored_dtype  # the components are trained, in another dtype
        parameters = {"up": TensorShape((shape[0], rank), dtype), "down": TensorShape((rank, shape[1]), dtype)}
        return AdapterTensors(parameters, buffers={}, made={})

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.up, self.down

    def pair(self) -> tuple[nn.Parameter, nn.Parameter]:
        return self.up, self.down


METHOD = Pissa
