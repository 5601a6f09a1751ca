"""LoSA: LoRA that leaves the zeros of a pruned model alone. Shape suffixes as in adapter.py; T = tokens."""

from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from qsvd.adapters.adapter import Adapter, AdapterOptions, Defaults, StoredWeight, frozen_shapes
from qsvd.adapters.methods.added import kaiming
from qsvd.errors import BadInput
from qsvd.plan.tensors import AdapterTensors, TensorShape

BITS = 8  # of a byte, which holds the masks of as many columns


def packed(mask_OI: Tensor) -> Tensor:
    """Return a mask of booleans as bits, uint8 [O, I / 8 rounded up]; the first column is the lowest bit."""
    padded = nn.functional.pad(mask_OI.to(torch.uint8), (0, -mask_OI.shape[1] % BITS))
    weights = 1 << torch.arange(BITS, dtype=torch.uint8, device=mask_OI.device)
    return (padded.view(len(mask_OI), -1, BITS) * weights).sum(dim=2, dtype=torch.uint8)


def unpacked(bits: Tensor, columns: int) -> Tensor:
    """Return the mask, bool [O, I]."""
    places = torch.arange(BITS, dtype=torch.uint8, device=bits.device)
    return (bits[:, :, None] >> places & 1).flatten(1)[:, :columns].bool()


class _MaskedProduct(Function):
    """(B A) o M, [O, I]. The mask is kept as bits, and unpacked again for the gradients."""

    @staticmethod
    def forward(ctx: Any, up_OK: Tensor, down_KI: Tensor, bits: Tensor) -> Tensor:
        ctx.save_for_backward(up_OK, down_KI, bits)
        return (up_OK @ down_KI).mul_(unpacked(bits, down_KI.shape[1]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        up_OK, down_KI, bits = ctx.saved_tensors
        gradient_OI = gradients[0] * unpacked(bits, down_KI.shape[1])
        return gradient_OI @ down_KI.T, up_OK.T @ gradient_OI, None


class Losa(Adapter):
    """LoSA (arXiv:2502.14816, equation of its masked LoRA): W' = Q + B0 A0 + (alpha / K) (B A) o M, from B = 0.

    M_ij is 1 where the stored Q_ij is not 0, so at stored rank 0 every zero of Q is a zero of W'. The zeros are those
    of the model that was quantized, which somebody has pruned, and those that rounding made. B A is formed densely in
    every forward pass. Parameters: K (O + I). K is cut to the smaller side of the weight.
    """

    paper = "2502.14816"
    starts_as = "zero, added"
    defaults = Defaults(
        rank=8,
        scale=2.0,
        learning_rate=2e-4,
        reason="the authors' rank and rate for Llama 2 7B; alpha is our choice",
    )
    starts_from_residual = True
    export_refusals = MappingProxyType(
        dict.fromkeys(
            ("peft", "lora"),
            "{method} changes no weight that is 0, and a product of two factors changes all; use --to merged",
        )
    )

    def __init__(self, stored: StoredWeight, up_OK: Tensor, down_KI: Tensor, *, scale: float):
        super().__init__()
        self.scale = scale
        self.register_buffer("frozen_up", stored.up_OR, persistent=False)
        self.register_buffer("frozen_down", stored.down_RI, persistent=False)
        self.register_buffer("mask", packed(stored.residual.decode() != 0), persistent=False)
        self.up, self.down = nn.Parameter(up_OK), nn.Parameter(down_KI)

    @classmethod
    def start(cls, stored: StoredWeight, options: AdapterOptions, generator: torch.Generator) -> "Losa":
        rank, scale = cls.defaults.rank_and_scale(options, stored.rank)
        if rank < 1:
            raise BadInput(f"rank {rank} is below 1, the least that trains anything")
        rank, (rows, columns) = min(rank, *stored.residual.shape), stored.residual.shape
        device, dtype = stored.up_OR.device, options.torch_dtype
        down_KI = kaiming(rank, columns, generator).to(device, dtype)
        return cls(stored, torch.zeros(rows, rank, dtype=dtype, device=device), down_KI, scale=scale)

    @classmethod
    def tensors(
        cls, shape: tuple[int, int], stored_rank: int, rank: int, dtype: torch.dtype, stored_dtype: torch.dtype
    ) -> AdapterTensors:
        (rows, columns), rank = shape, min(rank, *shape)
        parameters = {"up": TensorShape((rows, rank), dtype), "down": TensorShape((rank, columns), dtype)}
        mask = {"mask": TensorShape((rows, -(-columns // BITS)), torch.uint8)}
        dense = TensorShape(shape, dtype)  # and its gradient, which is there for one layer alone: an upper bound
        made = {"up": parameters["up"], "masked": dense, "gradient": dense}
        return AdapterTensors(parameters, frozen_shapes(shape, stored_rank, stored_dtype) | mask, made)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.get_buffer("frozen_up"), self.get_buffer("frozen_down")

    def delta(self, x_TI: Tensor) -> Tensor:
        masked_OI = _MaskedProduct.apply(self.scale * self.up, self.down, self.get_buffer("mask"))
        assert isinstance(masked_OI, Tensor), "apply returns what forward does"
        return x_TI @ masked_OI.to(x_TI.dtype).T


METHOD = Losa
