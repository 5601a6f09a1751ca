"""Splits of the literature, written from the formulas of the papers: W ~ Q + B A with block-quantized Q.

Of qsvd this uses the level tables and the block encoding of its codecs, so that the format is equal; nothing else. The
dtype of the weight is the dtype of the work: float64, and float32 for large matrices. Every method returns Q as it
decodes, and B and A before they are rounded to 16 bits.

H = E[x x^T] is the second moment of the inputs of the layer. F is the Fisher information of W, by its row and column
means.

Shape suffixes: O = out features, I = in features, R = rank, J = columns of a tile, B = blocks, E = elements of a block.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qsvd.numerics import codebook
from qsvd.numerics.codec import Codec
from qsvd.numerics.nf4 import NormalFloat4
from qsvd.numerics.normal_float import NormalFloat

GPTQ_DAMPING = 0.01  # of the mean of H's diagonal: the default of GPTQ's code
ROOT_DAMPING = 1e-6  # of the same mean, so that H has a Cholesky factor
TILE = 128  # columns whose errors are moved onto the later ones by one product, as in GPTQ's algorithm 1
EXACT_SIDE = 2048  # longest shorter side with a full SVD
OVERSAMPLING, POWER_ITERATIONS = 32, 4  # of the randomized SVD above it
ALTERNATIONS = 5
MOST_ALTERNATIONS = 100  # of LQ-LoRA, which stops when the error rises

Parts = tuple[Tensor, Tensor | None, Tensor | None]  # Q, B, A


@dataclass(frozen=True)
class Weight:
    """A matrix with its statistics, all of one dtype.

    Args:
        weight_OI: W.
        inputs_II: H.
        outputs_OO: G, the second moment of the gradient at the outputs.
        rows_O, columns_I: The means of F over columns and over rows, up to a factor.
    """

    weight_OI: Tensor
    inputs_II: Tensor
    outputs_OO: Tensor
    rows_O: Tensor
    columns_I: Tensor

    @cached_property
    def root_II(self) -> Tensor:
        """L, lower triangular, with H = L L^T."""
        return torch.linalg.cholesky(damped(self.inputs_II, ROOT_DAMPING))

    @cached_property
    def upper_II(self) -> Tensor:
        """U, upper triangular, with H^-1 = U^T U: the matrix of GPTQ's algorithm 1."""
        lower_II = torch.linalg.cholesky(damped(self.inputs_II, GPTQ_DAMPING))
        return torch.linalg.cholesky(torch.cholesky_inverse(lower_II), upper=True)


def damped(moment_II: Tensor, share: float) -> Tensor:
    """Return H + share * mean(diag H) * I."""
    result_II = moment_II.clone()
    result_II.diagonal().add_(share * moment_II.diagonal().mean())
    return result_II


def nearest(target_OI: Tensor, codec: Codec) -> Tensor:
    """Return what the codec decodes a matrix to: largest magnitudes as scales, nearest levels."""
    return codec.encode(target_OI.float()).decode().to(target_OI.dtype)


def low_rank(error_OI: Tensor, rank: int, root_II: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return B, A of a rank with the least ||(E - B A) L||_F (Eckart and Young); without a root L is the identity."""
    scaled_OI = error_OI if root_II is None else error_OI @ root_II
    if min(scaled_OI.shape) <= EXACT_SIDE:
        up_OR, down_RI = top_factors(scaled_OI, rank)
    else:
        torch.manual_seed(0)
        up, values, columns = torch.svd_lowrank(scaled_OI, rank + OVERSAMPLING, POWER_ITERATIONS)
        sizes_R = values[:rank].sqrt()
        up_OR, down_RI = up[:, :rank] * sizes_R, sizes_R[:, None] * columns.T[:rank]
    if root_II is not None:
        down_RI = torch.linalg.solve_triangular(root_II, down_RI, upper=False, left=False)
    return up_OR, down_RI


def top_factors(matrix_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the best factors of a rank, with equal lengths, by the eigenvectors of the smaller Gram matrix.

    That takes less time than a singular value decomposition, and the largest factors are as exact.
    """
    if matrix_OI.shape[0] > matrix_OI.shape[1]:
        up_IR, down_RO = top_factors(matrix_OI.T, rank)
        return down_RO.T, up_IR.T
    squares, vectors = torch.linalg.eigh(matrix_OI @ matrix_OI.T)
    up_OR, sizes_R = vectors[:, -rank:], squares[-rank:].sqrt().sqrt()
    return up_OR * sizes_R, (up_OR.T @ matrix_OI) / sizes_R[:, None]


def gptq(target_OI: Tensor, upper_II: Tensor, codec: Codec) -> Tensor:
    """Return GPTQ's rounding of a matrix (arXiv:2210.17323, algorithm 1), which is LDLQ (arXiv:2307.13304, theorem 6).

    Every column is rounded to the nearest levels, and its error is moved onto the later columns. A block gets its
    scale, its largest magnitude, when its first column is rounded. If blocks cross rows, scales are those of the matrix
    before rounding.

    Args:
        upper_II: U, upper triangular, with H^-1 = U^T U.
    """
    rows, columns = target_OI.shape
    size, is_aligned = codec.block_size, columns % codec.block_size == 0
    work_IO = target_OI.T.contiguous()
    rounded_IO = torch.empty_like(work_IO)
    scales_IO = None if is_aligned else block_scales(target_OI, codec)
    scale_O = work_IO.new_zeros(rows)
    for first in range(0, columns, TILE):
        last = min(first + TILE, columns)
        moved_JO = torch.empty_like(work_IO[first:last])
        for column in range(first, last):
            if scales_IO is not None:
                scale_O = scales_IO[column]
            elif column % size == 0:
                scale_O = stored(work_IO[column : column + size].abs().amax(dim=0), codec)
            rounded_IO[column] = to_levels(work_IO[column], scale_O, codec.bits)
            moved_O = (work_IO[column] - rounded_IO[column]) / upper_II[column, column]
            work_IO[column + 1 : last] -= upper_II[column, column + 1 : last, None] * moved_O
            moved_JO[column - first] = moved_O
        work_IO[last:] -= upper_II[first:last, last:].T @ moved_JO
    return rounded_IO.T.contiguous()


def block_scales(target_OI: Tensor, codec: Codec) -> Tensor:
    """Return the scale of every number [I, O]: the largest magnitude of its block."""
    flat_N = target_OI.reshape(-1)
    padded_BE = torch.nn.functional.pad(flat_N, (0, -len(flat_N) % codec.block_size)).view(-1, codec.block_size)
    scales_B = stored(padded_BE.abs().amax(dim=1), codec)
    return scales_B.repeat_interleave(codec.block_size)[: len(flat_N)].view(target_OI.shape).T


def stored(scales: Tensor, codec: Codec) -> Tensor:
    """Return scales rounded to the dtype that the codec stores."""
    return scales.to(codec.scale_dtype).to(scales.dtype)


def to_levels(values_O: Tensor, scale_O: Tensor, bits: int) -> Tensor:
    """Return the nearest levels times the scales."""
    levels_L = codebook.levels(bits).to(values_O.dtype)
    divided_O = torch.where(scale_O == 0, 0, values_O / scale_O)
    return levels_L[torch.bucketize(divided_O, (levels_L[1:] + levels_L[:-1]) / 2)] * scale_O


def finer(codec: Codec) -> Codec:
    """Return the codec with blocks of half the size: bytes spent on scales instead of components."""
    size = codec.block_size // 2
    if isinstance(codec, NormalFloat4):
        return NormalFloat4(double_quant=False, block_size=size)
    return NormalFloat(bits=codec.bits, block_size=size, scales=codec.scale_dtype)


def qlora(weight: Weight, codec: Codec, _rank: int) -> Parts:
    """QLoRA (arXiv:2305.14314): NormalFloat of W."""
    return nearest(weight.weight_OI, codec), None, None


def rounded_by_gptq(weight: Weight, codec: Codec, _rank: int) -> Parts:
    """GPTQ with the levels and blocks of the codec."""
    return gptq(weight.weight_OI, weight.upper_II, codec), None, None


def loftq(weight: Weight, codec: Codec, rank: int) -> Parts:
    """LoftQ (arXiv:2310.08659, algorithm 1), from Q = q(W)."""
    product_OI = torch.zeros_like(weight.weight_OI)
    for _ in range(ALTERNATIONS):
        residual_OI = nearest(weight.weight_OI - product_OI, codec)
        up_OR, down_RI = low_rank(weight.weight_OI - residual_OI, rank)
        product_OI = up_OR @ down_RI
    return residual_OI, up_OR, down_RI


def qpissa(weight: Weight, codec: Codec, rank: int) -> Parts:
    """QPiSSA with several iterations (arXiv:2404.02948, section 4.2), from the SVD of W; ends with quantization."""
    residual_OI = torch.zeros_like(weight.weight_OI)
    for _ in range(ALTERNATIONS):
        up_OR, down_RI = low_rank(weight.weight_OI - residual_OI, rank)
        residual_OI = nearest(weight.weight_OI - up_OR @ down_RI, codec)
    return residual_OI, up_OR, down_RI


def lq_lora(weight: Weight, codec: Codec, rank: int) -> Parts:
    """LQ-LoRA with Fisher weights (arXiv:2311.12023, algorithm 2 and section 3.3); returns the last before a rise."""
    rows_O1, columns_I = weight.rows_O.sqrt()[:, None], weight.columns_I.sqrt()
    best, least = None, float("inf")
    residual_OI = torch.zeros_like(weight.weight_OI)
    for _ in range(MOST_ALTERNATIONS):
        up_OR, down_RI = low_rank(rows_O1 * (weight.weight_OI - residual_OI) * columns_I, rank)
        up_OR, down_RI = up_OR / rows_O1, down_RI / columns_I
        residual_OI = nearest(weight.weight_OI - up_OR @ down_RI, codec)
        error = float((rows_O1 * (weight.weight_OI - residual_OI - up_OR @ down_RI) * columns_I).norm())
        if error >= least:
            break
        best, least = (residual_OI, up_OR, down_RI), error
    assert best is not None, "the first error is finite"
    return best


def qera_approximate(weight: Weight, codec: Codec, rank: int) -> Parts:
    """QERA's approximate form (arXiv:2410.06040, theorem 2): the diagonal of H only."""
    sizes_I = weight.inputs_II.diagonal().sqrt()
    sizes_I = sizes_I.clamp(min=ROOT_DAMPING * float(sizes_I.mean()))
    residual_OI = nearest(weight.weight_OI, codec)
    up_OR, down_RI = low_rank((weight.weight_OI - residual_OI) * sizes_I, rank)
    return residual_OI, up_OR, down_RI / sizes_I


def qera_exact(weight: Weight, codec: Codec, rank: int) -> Parts:
    """QERA's exact form (arXiv:2410.06040, theorem 1). Every root of H gives the same B and A."""
    residual_OI = nearest(weight.weight_OI, codec)
    return residual_OI, *low_rank(weight.weight_OI - residual_OI, rank, weight.root_II)


def cloq(weight: Weight, codec: Codec, rank: int) -> Parts:
    """CLoQ (arXiv:2501.18475): GPTQ of W, then the exact components of its error in the norm of H."""
    residual_OI = gptq(weight.weight_OI, weight.upper_II, codec)
    return residual_OI, *low_rank(weight.weight_OI - residual_OI, rank, weight.root_II)


def caldera(weight: Weight, codec: Codec, rank: int, alternations: int = ALTERNATIONS) -> Parts:
    """CALDERA (arXiv:2405.18886, algorithm 1) with 16-bit components: LDLQ and components in the norm of H, in turns.

    It starts from the components of W, which is better than from zeros, and returns the best pass, as its code does.
    The Hadamard transform and the lattice codebook of the paper would be another format.
    """
    best, least = None, float("inf")
    up_OR, down_RI = low_rank(weight.weight_OI, rank, weight.root_II)
    for _ in range(alternations):
        residual_OI = gptq(weight.weight_OI - up_OR @ down_RI, weight.upper_II, codec)
        up_OR, down_RI = low_rank(weight.weight_OI - residual_OI, rank, weight.root_II)
        error = float(((weight.weight_OI - residual_OI - up_OR @ down_RI) @ weight.root_II).norm())
        if error < least:
            best, least = (residual_OI, up_OR, down_RI), error
    assert best is not None, "the first error is finite"
    return best


Method = Callable[[Weight, Codec, int], Parts]
