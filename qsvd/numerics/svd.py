"""The best rank-r factors of a matrix: randomized subspace iteration (Halko et al., arXiv:0909.4061), or an exact SVD.

All but `product_svd` and `shared_directions` take a matrix or a stack of matrices, [..., O, I], and decompose the
matrices of a stack together.

Shape suffixes: O = out features, I = in features, K = sketch columns, R = rank.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

OVERSAMPLE = 16  # least number of extra sketch columns; Halko et al. ask for 5 to 10
OVERSAMPLE_SHARE = 2  # at least rank / 2 extra columns: slowly falling spectra need a wider sketch or many more passes
SMALL = 256  # a matrix with a side of at most this length is decomposed exactly, which is faster there

SHARED_PASSES = 8  # over a matrix that is made once for many layers


@dataclass(frozen=True)
class TopSVD:
    """The leading part of an SVD, M ~ left diag(values) right.

    Args:
        left_OK: float32, orthonormal columns.
        values_K: float32, descending.
        right_KI: float32, orthonormal rows.
    """

    left_OK: Tensor
    values_K: Tensor
    right_KI: Tensor

    def factors(self, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return up [O, R] = U sqrt(S) and down [R, I] = sqrt(S) V^T, balanced (PiSSA, eq. 2-3), rounded to dtype."""
        root_R = self.values_K[..., :rank].sqrt()
        up_OR = self.left_OK[..., :rank] * root_R[..., None, :]
        return up_OR.to(dtype), (root_R[..., None] * self.right_KI[..., :rank, :]).to(dtype)


@dataclass(frozen=True)
class Product:
    """before^T M after, which thin matrices are multiplied with while it is not computed itself.

    Args:
        matrix_OI: float32 [..., O, I].
        after_II, before_OO: None is the identity.
    """

    matrix_OI: Tensor
    after_II: Tensor | None
    before_OO: Tensor | None

    @property
    def shape(self) -> torch.Size:
        return self.matrix_OI.shape

    @property
    def device(self) -> torch.device:
        return self.matrix_OI.device

    @property
    def mT(self) -> "Product":  # as that of a Tensor
        return Product(self.matrix_OI.mT, self.before_OO, self.after_II)

    def __matmul__(self, thin_IK: Tensor) -> Tensor:
        found_OK = self.matrix_OI @ (thin_IK if self.after_II is None else self.after_II @ thin_IK)
        return found_OK if self.before_OO is None else self.before_OO.mT @ found_OK

    def computed(self) -> Tensor:
        """Return it as one matrix."""
        scaled_OI = self.matrix_OI if self.after_II is None else self.matrix_OI @ self.after_II
        return scaled_OI if self.before_OO is None else self.before_OO.mT @ scaled_OI


def exact_svd(matrix_OI: Tensor | Product, rank: int) -> TopSVD:
    """Return the leading `rank` singular triples of a float32 [O, I] matrix by LAPACK or cuSOLVER."""
    _check_rank(matrix_OI, rank)
    whole_OI = matrix_OI.computed() if isinstance(matrix_OI, Product) else matrix_OI
    left, values, right = torch.linalg.svd(whole_OI, full_matrices=False)
    return TopSVD(left[..., :rank], values[..., :rank], right[..., :rank, :])


def randomized_svd(
    matrix_OI: Tensor | Product,
    rank: int,
    *,
    passes: int,
    generator: torch.Generator | Sequence[torch.Generator],
    start_KI: Tensor | None = None,
) -> TopSVD:
    """Return the leading singular triples of a matrix by subspace iteration; at least `rank` of them.

    Args:
        matrix_OI: float32 [O, I].
        rank: Number of triples wanted, 1..min(O, I).
        passes: Number of times that M and M^T are applied; one is enough from a good start.
        generator: Draws the first sketch; one for each matrix of a stack. Not used with start_KI.
        start_KI: right_KI of an earlier, similar matrix, whose subspace the iteration starts from.

    Raises:
        ValueError: rank or passes is out of range.
    """
    _check_rank(matrix_OI, rank)
    if passes < 1:
        raise ValueError(f"{passes} passes over the matrix cannot find a subspace; at least 1 is needed")
    columns = rank + max(OVERSAMPLE, rank // OVERSAMPLE_SHARE)
    if min(matrix_OI.shape[-2:]) <= max(SMALL, columns):
        return exact_svd(matrix_OI, rank)
    if start_KI is None or start_KI.shape[-2] < rank + OVERSAMPLE:
        basis_IK = normal((matrix_OI.shape[-1], columns), generator, matrix_OI.device)
    else:
        basis_IK = start_KI[..., : rank + OVERSAMPLE, :].mT  # a good start needs no wider sketch
    left_OK = orthonormal(matrix_OI @ basis_IK)
    basis_IK = matrix_OI.mT @ left_OK
    for _ in range(passes - 1):
        left_OK = orthonormal(matrix_OI @ basis_IK)
        basis_IK = matrix_OI.mT @ left_OK
    right_IK = orthonormal(basis_IK)
    inner_KK = (right_IK.mT @ basis_IK).mT
    inner_left, values_K, inner_right = torch.linalg.svd(inner_KK)
    return TopSVD(left_OK @ inner_left, values_K, inner_right @ right_IK.mT)


def normal(
    shape: tuple[int, int], generator: torch.Generator | Sequence[torch.Generator], device: torch.device
) -> Tensor:
    """Return a matrix of normal numbers, or a stack of them, each from its own generator."""
    if isinstance(generator, torch.Generator):
        return torch.randn(shape, generator=generator, device=device)
    return torch.stack([torch.randn(shape, generator=one, device=device) for one in generator])


def product_svd(up_OR: Tensor, down_RI: Tensor) -> TopSVD:
    """Return the SVD of up @ down, of any float dtype, on their device; it is the same on every machine.

    Two thin QRs and an R x R SVD in float64 on the CPU; the largest entry of each left vector is made positive.
    """
    left_OR, inner_RR = torch.linalg.qr(up_OR.cpu().double())
    right_IR, outer_RR = torch.linalg.qr(down_RI.cpu().double().T)
    found = torch.linalg.svd(inner_RR @ outer_RR.T, full_matrices=False)
    left_OR, right_RI = left_OR @ found.U, found.Vh @ right_IR.T
    signs_R = left_OR.gather(0, left_OR.abs().argmax(dim=0, keepdim=True)).sign()
    parts = (left_OR * signs_R, found.S, right_RI * signs_R.T)
    return TopSVD(*(part.to(up_OR.device, torch.float32) for part in parts))


def shared_directions(factors: Iterable[tuple[Tensor, Tensor]], rank: int) -> Tensor:
    """Return the `rank` leading left singular vectors of several products up @ down, side by side: float32 [O, K].

    With down down^T = T T^T they are those of the thin matrices up T, which are summed as a Gram matrix once they have
    more than O columns. On the CPU; the largest entry of each vector is positive.

    Args:
        factors: up [O, R] and down [R, I] of any float dtype; all have the same O.
        rank: 1..O, at most the sum of all R.
    """
    thin: list[Tensor] = []
    gram_OO: Tensor | None = None
    for up_OR, down_RI in factors:
        exact_RI = down_RI.cpu().double()
        values_R, vectors_RR = torch.linalg.eigh(exact_RI @ exact_RI.T)
        thin.append(up_OR.cpu().double() @ (vectors_RR * values_R.clamp(min=0).sqrt()))
        if gram_OO is not None or sum(part.shape[1] for part in thin) > len(up_OR):
            side_by_side = torch.cat(thin, dim=1)
            more_OO = side_by_side @ side_by_side.T
            gram_OO, thin = more_OO if gram_OO is None else gram_OO.add_(more_OO), []
    matrix = (torch.cat(thin, dim=1) if gram_OO is None else gram_OO).float()
    generator = torch.Generator().manual_seed(0)
    left_OK = randomized_svd(matrix, rank, passes=SHARED_PASSES, generator=generator).left_OK[:, :rank]
    return left_OK * left_OK.gather(0, left_OK.abs().argmax(dim=0, keepdim=True)).sign()


def orthonormal(tall: Tensor) -> Tensor:
    """Return an orthonormal basis of the columns of a float32 [..., n, k] matrix, n >= k, in few and large products.

    Cholesky-QR twice (Yamamoto et al., 2015); Householder QR for matrices whose columns are not independent enough.
    """
    once, first = _cholesky_qr(tall)
    twice, second = _cholesky_qr(once)
    failed = (first | second) != 0
    if failed.any():
        twice[failed] = torch.linalg.qr(tall[failed]).Q
    return twice


def _cholesky_qr(tall: Tensor) -> tuple[Tensor, Tensor]:
    """Do one Cholesky-QR step; a number [...] is not 0 where the Gram matrix is not positive definite."""
    upper, info = torch.linalg.cholesky_ex(tall.mT @ tall, upper=True)
    return torch.linalg.solve_triangular(upper, tall, upper=True, left=False), info


def _check_rank(matrix_OI: Tensor | Product, rank: int) -> None:
    shape = tuple(matrix_OI.shape[-2:])
    if not 1 <= rank <= min(shape):
        raise ValueError(f"rank {rank} is outside 1..{min(shape)}, the ranks of a {shape} matrix")
