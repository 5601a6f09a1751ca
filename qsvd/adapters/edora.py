"""EDoRA: a small trained core between frozen singular directions, and a magnitude per output (arXiv:2501.12067).

The adapted weight is V = Q + U (1 + s R) S V^T with U, S, V of the stored factors B0 A0, written here as
Q + (B0 + s U R M) A0, M = U^T B0: the same matrix, and bit for bit the stored one while R = 0. The magnitude replaces
the norm of each row: W' = m V / ||V||, the norm not differentiated, as in DoRA (arXiv:2402.09353, section 4.3).
The norms need no decoding: with q_i the rows of Q and b_i those of the up factor,

    ||q_i + b_i A0||^2 = ||q_i||^2 + 2 (Q A0^T)_i . b_i + b_i (A0 A0^T) b_i^T

and the first term, Q A0^T and A0 A0^T never change. Shape suffixes as in adapter.py; K = trained rank.
"""

import torch
from torch import Tensor, nn

from qsvd.adapters.adapter import Adapter, AdapterOptions, Defaults, Principal, chosen, stored_factors
from qsvd.plan.tensors import AdapterTensors, TensorShape

TINY = torch.finfo(torch.float32).tiny  # the square of a norm is no less: a row of zeros keeps the gain 1


class EDora(Adapter):
    """A core R [K, K] from zero and a magnitude m [O] from the row norms of Q + B0 A0. Parameters: K^2 + O."""

    defaults = Defaults(
        rank=None,
        alpha=None,
        learning_rate=1e-3,
        reason="the largest but one of the authors' grid; few parameters between frozen directions bear a large rate",
    )

    starts_from_residual = True

    def __init__(self, principal: Principal, rank: int, scale: float, dtype: torch.dtype):
        super().__init__()
        self.scale = scale
        up_OR, down_RI = principal.up_OR, principal.down_RI
        directions_OR = _left_directions(up_OR, down_RI)
        frozen = {
            "frozen_up": up_OR,
            "frozen_down": down_RI,
            "directions": directions_OR[:, :rank].to(up_OR.dtype),
            "inner": directions_OR[:, :rank].T @ up_OR.float(),
        } | _norm_constants(principal)
        for name, tensor in frozen.items():
            self.register_buffer(name, tensor.contiguous(), persistent=False)
        self.core = nn.Parameter(torch.zeros(rank, rank, dtype=dtype, device=up_OR.device))
        self.magnitude = nn.Parameter(self._row_norms(up_OR.float()))  # float32: its steps vanish in bfloat16

    @classmethod
    def start(cls, principal: Principal, options: AdapterOptions, generator: torch.Generator) -> "EDora":
        del generator  # R starts at zero: the core has a gradient there, since what surrounds it is not zero
        if principal.rank == 0:
            raise ValueError(
                "edora trains between stored principal components, and this base has none (rank 0); "
                "quantize with --rank above 0, or train with --method lora"
            )
        rank, scale = chosen(options, cls.defaults, principal.rank)
        if not 1 <= rank <= principal.rank:
            raise ValueError(f"rank {rank} is outside 1..{principal.rank}, the principal components that are stored")
        return cls(principal, rank, scale, options.torch_dtype)

    @classmethod
    def tensors(
        cls, shape: tuple[int, int], stored_rank: int, rank: int, dtype: torch.dtype, stored_dtype: torch.dtype
    ) -> AdapterTensors:
        rows = shape[0]

        def exact(*sizes: int) -> TensorShape:
            return TensorShape(sizes, torch.float32)

        parameters = {"core": TensorShape((rank, rank), dtype), "magnitude": exact(rows)}
        constants = {
            "directions": TensorShape((rows, rank), stored_dtype),
            "inner": exact(rank, stored_rank),
            "residual_squares": exact(rows),
            "residual_down": exact(rows, stored_rank),
            "down_gram": exact(stored_rank, stored_rank),
        }
        made = {"up": exact(rows, stored_rank), "gain": exact(rows), "norms": exact(rows)}
        if stored_dtype != torch.float32:
            made["exact_directions"] = exact(rows, rank)
        return AdapterTensors(parameters, stored_factors(shape, stored_rank, stored_dtype) | constants, made)

    def factors(self) -> tuple[Tensor, Tensor]:
        inner_KR, frozen_OR = self.get_buffer("inner"), self.get_buffer("frozen_up")  # float32, and as stored
        core_KR = self.scale * self.core.to(inner_KR) @ inner_KR
        return frozen_OR.to(inner_KR) + self.get_buffer("directions").to(inner_KR) @ core_KR, self.get_buffer(
            "frozen_down"
        )

    def gain(self) -> Tensor:
        with torch.no_grad():
            norms_O = self._row_norms(self.factors()[0])
        return self.magnitude / norms_O

    def _row_norms(self, up_OR: Tensor) -> Tensor:
        """||q_i + b_i A0|| of every row, float32 [O]."""
        cross_O = (self.get_buffer("residual_down") * up_OR).sum(dim=1)
        inner_O = (up_OR @ self.get_buffer("down_gram") * up_OR).sum(dim=1)
        return (self.get_buffer("residual_squares") + 2 * cross_O + inner_O).clamp_(min=TINY).sqrt_()


def _left_directions(up_OR: Tensor, down_RI: Tensor) -> Tensor:
    """Left singular vectors of up @ down, largest value first, float32 [O, R], by two thin QRs and an R x R SVD.

    A saved core means nothing between other vectors, so they are the same on every machine: from the CPU, in float64,
    the largest entry of each positive.
    """
    basis_OR, inner_RR = torch.linalg.qr(up_OR.cpu().double())
    outer_RR = torch.linalg.qr(down_RI.cpu().double().T, mode="r").R
    vectors_OR = basis_OR @ torch.linalg.svd(inner_RR @ outer_RR.T).U
    largest_R = vectors_OR.gather(0, vectors_OR.abs().argmax(dim=0, keepdim=True))
    return (vectors_OR * largest_R.sign()).to(up_OR.device, torch.float32)


def _norm_constants(principal: Principal) -> dict[str, Tensor]:
    """||q_i||^2 [O], Q A0^T [O, R] and A0 A0^T [R, R], float32; the one decoding of Q."""
    residual_OI, down_RI = principal.residual.decode(), principal.down_RI.float()
    return {
        "residual_squares": residual_OI.square().sum(dim=1),
        "residual_down": residual_OI @ down_RI.T,
        "down_gram": down_RI @ down_RI.T,
    }
