"""RandLoRA: a full-rank sum of random products, whose scales are trained. Shape suffixes as in adapter.py.

D and M = the smaller and the larger side of the weight, N = bases, J = N K, T = tokens.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from qsvd.adapters.adapter import AdapterOptions, Defaults, StoredWeight, frozen_shapes
from qsvd.adapters.methods.added import size_of
from qsvd.adapters.methods.frozen import Frozen
from qsvd.adapters.methods.vera import shared_draw
from qsvd.plan.tensors import AdapterTensors, TensorShape

PIECE = 1 << 21  # elements of a matrix that are made or cast at a time


def times(x_TA: Tensor, shape: tuple[int, int], part: Callable[[slice], Tensor], step: int = 1) -> Tensor:
    """Return the product of x and a matrix of this shape [A, B], [T, B], of which only some columns are made at a time.

    Args:
        part: Returns columns of the matrix, in any dtype.
        step: Of which numbers of columns are multiples, but for the last ones.
    """
    rows, columns = shape
    width = step * max(1, PIECE // (rows * step))
    y_TB = x_TA.new_empty(len(x_TA), columns)
    for start in range(0, columns, width):
        some = slice(start, min(start + width, columns))
        torch.mm(x_TA, part(some).to(x_TA.dtype), out=y_TB[:, some])
    return y_TB


class _Inner:
    """The rows diag(lam_n) A diag(gam_n) of all bases, [J, D], made in pieces.

    Args:
        lam_KN, gam_ND: Trained.
        base_KD: A.
    """

    def __init__(self, lam_KN: Tensor, gam_ND: Tensor, base_KD: Tensor):
        self.lam_NK, self.gam_ND, self.base_KD = lam_KN.T.float(), gam_ND.float(), base_KD.float()
        self.shape = (lam_KN.numel(), base_KD.shape[1])
        self.dtype = lam_KN.dtype

    def columns(self, some: slice) -> Tensor:
        """Return some of the columns, [J, columns]."""
        scaled_NKD = self.lam_NK[:, :, None] * self.base_KD[None, :, some] * self.gam_ND[:, None, some]
        return scaled_NKD.flatten(0, 1)

    def rows_transposed(self, some: slice) -> Tensor:
        """Return the rows of some bases as columns, [D, rows]."""
        size = len(self.base_KD)
        bases = slice(some.start // size, some.stop // size)
        scaled_NKD = self.lam_NK[bases, :, None] * self.base_KD * self.gam_ND[bases, None]
        return scaled_NKD.flatten(0, 1).T

    def forth(self, x_TD: Tensor) -> Tensor:
        """Return x times the transposed rows, [T, J]."""
        return times(x_TD, (self.shape[1], self.shape[0]), self.rows_transposed, len(self.base_KD))

    def back(self, h_TJ: Tensor) -> Tensor:
        """Return h times the rows, [T, D]."""
        return times(h_TJ, self.shape, self.columns)

    def gradients(self, h_TJ: Tensor, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of lam [K, N] and gam [N, D], where that of the rows is h^T x [J, D]."""
        d_lam_NK, d_gam_ND = torch.zeros_like(self.lam_NK), torch.empty_like(self.gam_ND)
        width = max(1, PIECE // self.shape[0])
        for start in range(0, self.shape[1], width):
            some = slice(start, start + width)
            d_rows_NKD = (h_TJ.T @ x_TD[:, some]).float().view(*self.lam_NK.shape, -1).mul_(self.base_KD[:, some])
            torch.sum(d_rows_NKD * self.lam_NK[:, :, None], dim=1, out=d_gam_ND[:, some])
            d_lam_NK += d_rows_NKD.mul_(self.gam_ND[:, None, some]).sum(dim=2)
        return d_lam_NK.T.to(self.dtype), d_gam_ND.to(self.dtype)


class _Sum(Function):
    """x dW^T with dW = bases inner [O, I], or its transpose if the weight has fewer rows than columns.

    Only x is kept, and references to the parameters; matrices are made again in the backward pass, in pieces.
    """

    @staticmethod
    def forward(  # noqa: PLR0913  # autograd takes them one by one
        ctx: Any, x_TI: Tensor, lam_KN: Tensor, gam_ND: Tensor, base_KD: Tensor, bases_MJ: Tensor, is_tall: bool
    ) -> Tensor:
        ctx.save_for_backward(x_TI, lam_KN, gam_ND, base_KD, bases_MJ)
        ctx.is_tall = is_tall
        inner = _Inner(lam_KN, gam_ND, base_KD)
        return _outer(inner.forth(x_TI), bases_MJ.T) if is_tall else inner.back(_outer(x_TI, bases_MJ))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_TI, lam_KN, gam_ND, base_KD, bases_MJ = ctx.saved_tensors
        needs_x, dy_TO = ctx.needs_input_grad[0], gradients[0]
        inner = _Inner(lam_KN, gam_ND, base_KD)
        if ctx.is_tall:
            dh_TJ = _outer(dy_TO, bases_MJ)
            d_lam_KN, d_gam_ND = inner.gradients(dh_TJ, x_TI)
            dx_TI = inner.back(dh_TJ) if needs_x else None
        else:
            d_lam_KN, d_gam_ND = inner.gradients(_outer(x_TI, bases_MJ), dy_TO)
            dx_TI = _outer(inner.forth(dy_TO), bases_MJ.T) if needs_x else None
        return dx_TI, d_lam_KN, d_gam_ND, None, None, None


def _outer(x_TA: Tensor, matrix_AB: Tensor) -> Tensor:
    """Return x times a frozen matrix, which is cast in pieces."""
    if matrix_AB.dtype == x_TA.dtype:
        return x_TA @ matrix_AB
    rows, columns = matrix_AB.shape
    return times(x_TA, (rows, columns), lambda some: matrix_AB[:, some])


def random_sum(x_TI: Tensor, parts: Mapping[str, Tensor], dropout: float = 0.0, *, scale: float = 1.0) -> Tensor:
    """Return what is added, [T, O] in the dtype of x.

    Args:
        parts: Parameters and buffers of `RandLora` by name.
        dropout: It has none.
        scale: Of the sum of the products of `shared_bases` and `shared_base`.
    """
    del dropout
    bases_MJ, base_KD = parts["shared_bases"], parts["shared_base"]
    is_tall = x_TI.shape[1] == base_KD.shape[1]  # a square weight counts as tall, as in PEFT
    y_TO = _Sum.apply(x_TI, scale * parts["lam"], parts["gam"], base_KD, bases_MJ, is_tall)
    assert isinstance(y_TO, Tensor), "apply returns what forward does"
    return y_TO


def sizes_of(shape: tuple[int, int], rank: int) -> tuple[int, int, int, int]:
    """Return D, M, K and N of an [O, I] weight at this rank."""
    short, long = sorted(shape)
    rank = min(rank, short)
    return short, long, rank, math.ceil(short / rank)


class RandLora(Frozen):
    """RandLoRA (arXiv:2502.00987): W' = Q + B0 A0 + (alpha / K) sum_n B_n diag(lam_n) A diag(gam_n), of full rank.

    lam_n [K] and gam_n [D] are trained. A [K, D] and B_n [M, K] are random with a deviation of 1, frozen, the same in
    all layers with these sizes and drawn as VeRA's; the sum is transposed where the weight has fewer rows than columns.
    lam = 0 and gam = 1 / max(N, D) at the start, and alpha = 20 K, as in PEFT. The dense sum is never made: x passes A
    and the bases in pieces. Parameters: N (K + D) with N = D / K rounded up: more at smaller ranks.
    """

    paper = "2502.00987"
    starts_as = "zero, added"
    defaults = Defaults(
        rank=32, scale=20.0, learning_rate=1e-4, reason="PEFT's rank and alpha, and the authors' rate for commonsense"
    )
    export_refusals = MappingProxyType(
        {
            "peft": "{method} changes weights at full rank, which a LoRA cannot do, and PEFT's RandLoRA has one pair "
            "of bases for layers of all sizes; use --to merged",
            "lora": "{method} changes weights at full rank, which a LoRA cannot do; use --to merged",
        }
    )

    def __init__(self, stored: StoredWeight, options: AdapterOptions):
        super().__init__(stored.up_OR, stored.down_RI)
        rank, scale = size_of(self.defaults, stored, options)
        short, long, rank, bases = sizes_of(stored.residual.shape, rank)
        like = stored.up_OR
        sizes = {"shared_bases": (long, bases * rank), "shared_base": (rank, short)}
        for name, size in sizes.items():
            self.register_buffer(name, shared_draw(*size, options.seed, like, f"randlora {name}"), persistent=False)
        self.scale = scale * 3 * math.sqrt(short * bases * rank)  # to a deviation of 1; a row of n has 1 / sqrt(3 n)
        start = torch.full((bases, short), 1 / max(bases, short))
        self.lam = nn.Parameter(torch.zeros(rank, bases, dtype=options.torch_dtype, device=like.device))
        self.gam = nn.Parameter(start.to(like.device, options.torch_dtype))

    @classmethod
    def start(cls, stored: StoredWeight, options: AdapterOptions, generator: torch.Generator) -> "RandLora":
        del generator  # it is the weight's own
        return cls(stored, options)

    @classmethod
    def tensors(
        cls, shape: tuple[int, int], stored_rank: int, rank: int, dtype: torch.dtype, stored_dtype: torch.dtype
    ) -> AdapterTensors:
        short, long, rank, bases = sizes_of(shape, rank)
        return AdapterTensors(
            parameters={"lam": TensorShape((rank, bases), dtype), "gam": TensorShape((bases, short), dtype)},
            buffers=frozen_shapes(shape, stored_rank, stored_dtype),
            made={},
            shared={
                "shared_bases": TensorShape((long, bases * rank), stored_dtype),
                "shared_base": TensorShape((rank, short), stored_dtype),
            },
            delta=random_sum,
            numbers=bases * rank * (long + short),
        )

    def delta(self, x_TI: Tensor) -> Tensor:
        return random_sum(x_TI, dict(self.named_parameters()) | dict(self.named_buffers()), scale=self.scale)


METHOD = RandLora
