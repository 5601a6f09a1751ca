"""DoRA: LoRA with a trained magnitude for each row. Shape suffixes as in adapter.py."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from qsvd.adapters.adapter import NO_LORA_OF_GAINS, TINY, AdapterOptions, Defaults, StoredWeight
from qsvd.adapters.methods.added import Added, joined, kaiming
from qsvd.adapters.methods.hooks import Hooks
from qsvd.numerics.codec import BAND, PackedBlocks
from qsvd.plan.tensors import AdapterTensors, TensorShape


class _KeepNorms(Hooks):
    """Lets each adapter keep its norms within a step, whose forward passes all have the same parameters."""

    def __init__(self, *given: object):
        super().__init__(*given)  # pyright: ignore[reportArgumentType]
        for adapter in self.adapters.values():
            adapter.keeps_norms = True

    def after_step(self, step: int) -> None:
        del step
        for adapter in self.adapters.values():
            adapter.forget()

    def end(self) -> None:
        for adapter in self.adapters.values():
            adapter.keeps_norms = False
            adapter.forget()


class Dora(Added):
    """DoRA (arXiv:2402.09353, equation 5): W' = m V / ||V||_row, V = Q + B0 A0 + (alpha / K) B A; m, B and A trained.

    The norms have no gradient (section 4.3). With C = (Q + B0 A0) A^T they need no dense weight:

        ||V_i||^2 = ||(Q + B0 A0)_i||^2 + 2 s B_i C_i^T + s^2 B_i (A A^T) B_i^T

    Q is decoded for the first term once, and for C once an optimizer step, if the trainer calls the hooks, else in
    every forward pass. Parameters: K (O + I) + O.
    """

    paper = "2402.09353"
    starts_as = "zero, added"
    defaults = Defaults(
        rank=32, scale=2.0, learning_rate=1e-4, reason="the authors' rank, alpha and rate for Llama-3-8B"
    )
    shared_options = ("rslora",)
    hooks = _KeepNorms
    starts_from_residual = True
    has_gain = True
    export_refusals = NO_LORA_OF_GAINS
    keeps_norms: bool = False
    norms: Tensor | None = None

    def __init__(self, stored: StoredWeight, up_OK: Tensor, down_KI: Tensor, *, scale: float):
        super().__init__(stored, scale=scale)
        dense_OI = stored.residual.decode().addmm_(stored.up_OR.float(), stored.down_RI.float())
        self.register_buffer("squares", dense_OI.square_().sum(dim=1), persistent=False)
        self.up, self.down = nn.Parameter(up_OK), nn.Parameter(down_KI)
        magnitude_O = self.get_buffer("squares").clamp(min=TINY).sqrt()
        self.magnitude = nn.Parameter(magnitude_O)  # float32: its steps vanish in bfloat16

    @classmethod
    def start(cls, stored: StoredWeight, options: AdapterOptions, generator: torch.Generator) -> "Dora":
        rank, scale = cls.size(stored, options)
        out_features, in_features = stored.residual.shape
        device, dtype = stored.up_OR.device, options.torch_dtype
        down_KI = kaiming(rank, in_features, generator).to(device, dtype)
        return cls(stored, torch.zeros(out_features, rank, dtype=dtype, device=device), down_KI, scale=scale)

    @classmethod
    def tensors(
        cls, shape: tuple[int, int], stored_rank: int, rank: int, dtype: torch.dtype, stored_dtype: torch.dtype
    ) -> AdapterTensors:
        (rows, columns), rank = shape, min(rank, *shape)
        exact = TensorShape((rows,), torch.float32)
        parameters = {"up": TensorShape((rows, rank), dtype), "down": TensorShape((rank, columns), dtype)}
        found = joined(shape, stored_rank, {**parameters, "magnitude": exact}, rank, (dtype, stored_dtype))
        return replace(
            found, buffers={**found.buffers, "squares": exact}, made={**found.made, "gain": exact, "norms": exact}
        )

    def added(self) -> tuple[Tensor, Tensor]:
        return self.scale * self.up, self.down

    def pair(self) -> tuple[nn.Parameter, nn.Parameter]:
        return self.up, self.down

    def forget(self) -> None:
        self.norms = None

    def gain(self, read: Callable[[], PackedBlocks]) -> Tensor:
        norms_O = self.norms
        if norms_O is None:
            norms_O = self._row_norms(read())
            if self.keeps_norms:
                self.norms = norms_O
        return self.magnitude / norms_O

    @torch.no_grad()
    def _row_norms(self, residual: PackedBlocks) -> Tensor:
        """Return ||V_i|| of every row, float32 [O]."""
        up_OK, down_KI = self.scale * self.up.float(), self.down.float()
        cross_OK = down_KI.new_empty(len(up_OK), len(down_KI))  # Q A^T
        for rows, band in residual.in_rows(BAND[down_KI.device.type]):
            torch.mm(band.decode(), down_KI.T, out=cross_OK[rows])
        cross_OK += self.get_buffer("frozen_up").float() @ (self.get_buffer("frozen_down").float() @ down_KI.T)
        cross_OK.mul_(2).addmm_(up_OK, down_KI @ down_KI.T)
        squares_O = (cross_OK * up_OK).sum(dim=1).add_(self.get_buffer("squares"))
        return squares_O.clamp_(min=TINY).sqrt_()


METHOD = Dora
