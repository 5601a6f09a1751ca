"""PiSSA: the stored components are trained. Shape suffixes as in adapter.py."""

import torch
from torch import Tensor, nn

from qsvd.adapters.adapter import Adapter, AdapterOptions, Defaults, StoredWeight, check_as_stored
from qsvd.plan.tensors import AdapterTensors, TensorShape


class Pissa(Adapter):
    """PiSSA (arXiv:2404.02948, section 3): W' = Q + B A, with the components B and A trained. Parameters: R (O + I).

    Components of every loop (QPiSSA, LoftQ, LQ-LoRA) are trained alike.
    """

    paper = "2404.02948"
    starts_as = "the components"
    defaults = Defaults(
        rank=None,
        scale=1.0,
        learning_rate=2e-5,
        reason="the authors' rate; large singular values make the loss sharper than LoRA's, so it is smaller",
    )
    needs_components = True
    takes_rank = False

    def __init__(self, up_OR: Tensor, down_RI: Tensor):
        super().__init__()
        self.up = nn.Parameter(up_OR)
        self.down = nn.Parameter(down_RI)

    @classmethod
    def start(cls, stored: StoredWeight, options: AdapterOptions, generator: torch.Generator) -> "Pissa":
        del generator  # nothing is drawn
        check_as_stored("pissa", stored, options)
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
