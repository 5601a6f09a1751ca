"""EDoRA: LoRA-XS with a magnitude for each row. Shape suffixes as in adapter.py."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from qsvd.adapters.adapter import NO_LORA_OF_GAINS, TINY, Defaults, StoredWeight
from qsvd.adapters.methods.core import Core
from qsvd.numerics.codec import PackedBlocks
from qsvd.plan.tensors import AdapterTensors, TensorShape


class EDora(Core):
    """EDoRA (arXiv:2501.12067): a core R [K, K] between frozen singular directions, and a magnitude m [O] of the rows.

    R starts at zero, and m at the row norms of Q + B0 A0. Parameters: K^2 + O.
    """

    paper = "2501.12067"
    starts_as = "the components, core 0"
    defaults = Defaults(
        rank=None,
        scale=1.0,
        learning_rate=1e-3,
        reason="the second largest of the authors' grid; few parameters are trained, so a higher rate works",
    )

    starts_from_residual = True
    has_gain = True
    export_refusals = NO_LORA_OF_GAINS

    def __init__(self, stored: StoredWeight, rank: int, scale: float, dtype: torch.dtype):
        super().__init__(stored, rank, scale, dtype)
        for name, tensor in _norm_constants(stored).items():
            self.register_buffer(name, tensor.contiguous(), persistent=False)
        self.magnitude = nn.Parameter(self._row_norms(stored.up_OR.float()))  # float32: its steps vanish in bfloat16

    @classmethod
    def tensors(
        cls, shape: tuple[int, int], stored_rank: int, rank: int, dtype: torch.dtype, stored_dtype: torch.dtype
    ) -> AdapterTensors:
        core, rows = super().tensors(shape, stored_rank, rank, dtype, stored_dtype), shape[0]

        def exact(*sizes: int) -> TensorShape:
            return TensorShape(sizes, torch.float32)

        constants = {
            "residual_squares": exact(rows),
            "residual_down": exact(rows, stored_rank),
            "down_gram": exact(stored_rank, stored_rank),
        }
        return replace(
            core,
            parameters={**core.parameters, "magnitude": exact(rows)},
            buffers={**core.buffers, **constants},
            made={**core.made, "gain": exact(rows), "norms": exact(rows)},
        )

    def gain(self, read: Callable[[], PackedBlocks]) -> Tensor:
        del read  # the constants of the norms are enough
        with torch.no_grad():
            norms_O = self._row_norms(self.factors()[0])
        return self.magnitude / norms_O

    def _row_norms(self, up_OR: Tensor) -> Tensor:
        """Return ||q_i + b_i A0|| of every row, float32 [O]."""
        cross_O = (self.get_buffer("residual_down") * up_OR).sum(dim=1)
        inner_O = (up_OR @ self.get_buffer("down_gram") * up_OR).sum(dim=1)
        return (self.get_buffer("residual_squares") + 2 * cross_O + inner_O).clamp_(min=TINY).sqrt_()


def _norm_constants(stored: StoredWeight) -> dict[str, Tensor]:
    """Return ||q_i||^2 [O], Q A0^T [O, R] and A0 A0^T [R, R], float32; Q is decoded only here."""
    residual_OI, down_RI = stored.residual.decode(), stored.down_RI.float()
    return {
        "residual_squares": residual_OI.square().sum(dim=1),
        "residual_down": residual_OI @ down_RI.T,
        "down_gram": down_RI @ down_RI.T,
    }


METHOD = EDora
