"""Draw random tensors like those of a trained language model, in a few nanoseconds per element.

A weight has a few hundred singular values above the noise that decrease by a power law, heavy-tailed entries and some
outlier columns. A split has the codes and scales that NF4 has of Gaussian noise, and factors that decrease by the same
law. Every draw depends only on the seed, the tensor's name and the kind of device, not on the order of the tensors. A
CPU and a GPU draw different numbers.

Shape suffixes: O = out features, I = in features, R = rank, B = blocks, N = elements.
"""

import hashlib
import math
from functools import cache

import torch
from torch import Tensor

from qsvd.numerics.codec import NestedScales
from qsvd.numerics.nf4 import NormalFloat4, nest

STD = 0.02  # of a weight's noise, and of an embedding
COMPONENTS = 256  # singular values above the noise, or a quarter of the shorter side
TOP = 4.0  # the largest of them, over the largest that the noise alone has
POWER = 0.6  # they decrease as 1 / number ** POWER
FREEDOM = 8  # degrees of freedom of Student's t, whose excess kurtosis is then 1.5
OUTLIERS = 6  # columns that are larger than the others
OUTLIER_GAIN = 5.0
TABLE = 1 << 16  # values that every draw picks from
RUN_CPU, RUN_GPU = 1 << 18, 1 << 24  # elements drawn at a time: what stays in cache, what fills a GPU
RUNS_IN_BAND = 4  # of a weight; the product of the factors is faster with more rows


def draw_weight(shape: tuple[int, int], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Return a weight [O, I] with the spectrum, the tails and the outlier columns of a trained one."""
    (rows, columns), device = shape, generator.device
    up_OR, down_RI = draw_factors(shape, min(COMPONENTS, max(1, min(shape) // 4)), generator)
    outliers = torch.randperm(columns, generator=generator, device=device)[: min(OUTLIERS, max(1, columns // 8))]
    weight_OI = torch.empty(shape, dtype=dtype, device=device)
    height = max(1, RUNS_IN_BAND * _run(device) // columns)
    scratch_OI = torch.empty(min(rows, height), columns, device=device)
    for start in range(0, rows, height):
        band_OI = weight_OI[start : start + height]
        drawn_OI = scratch_OI[: len(band_OI)]
        _pick_into(drawn_OI.view(-1), "t", generator)
        drawn_OI.mul_(STD).addmm_(up_OR[start : start + height], down_RI)
        drawn_OI[:, outliers] *= OUTLIER_GAIN
        band_OI.copy_(drawn_OI)
    return weight_OI


def draw_gaussian(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Return Gaussian values of deviation STD: an embedding, a head, a convolution kernel."""
    values_N = torch.empty(math.prod(shape), dtype=dtype, device=generator.device)
    scratch_N = torch.empty(min(len(values_N), _run(generator.device)), device=generator.device)
    for run_N in values_N.split(_run(generator.device)):
        drawn_N = scratch_N[: len(run_N)]
        _pick_into(drawn_N, "normal", generator)
        run_N.copy_(drawn_N.mul_(STD))
    return values_N.view(shape)


def draw_codes(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Return codes with the frequencies of NF4 of Gaussian noise [O, I], uint8 [ceil(O * I / 2)]."""
    codes = torch.empty(math.ceil(math.prod(shape) / 2), dtype=torch.uint8, device=generator.device)
    _pick_into(codes, "codes", generator)
    return codes


def draw_scales(shape: tuple[int, int], codec: NormalFloat4, generator: torch.Generator) -> Tensor | NestedScales:
    """Return scales for `draw_codes`: maxima of blocks of noise of deviation STD, quantized as by the codec."""
    scales_B = torch.empty(math.ceil(math.prod(shape) / codec.block_size), device=generator.device)
    _pick_into(scales_B, "maxima", generator)
    scales_B.mul_(STD)
    return nest(scales_B) if codec.double_quant else scales_B


def draw_factors(shape: tuple[int, int], rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return B [O, R] and A [R, I], float32, each with the square root of singular values of a power law."""
    device = generator.device
    edge = STD * (math.sqrt(shape[0]) + math.sqrt(shape[1]))  # the largest singular value of noise (Marchenko-Pastur)
    values_R = TOP * edge * torch.arange(1, rank + 1, device=device).float().pow(-POWER)
    up_OR = torch.randn(shape[0], rank, generator=generator, device=device) / math.sqrt(shape[0])
    down_RI = torch.randn(rank, shape[1], generator=generator, device=device) / math.sqrt(shape[1])
    return up_OR * values_R.sqrt(), down_RI * values_R.sqrt()[:, None]


def generator_of(seed: int, name: str, device: torch.device) -> torch.Generator:
    """Return the generator of one tensor."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:6]))


def _pick_into(out_N: Tensor, table: str, generator: torch.Generator) -> None:
    """Fill with values of a table, all equally likely: one 64-bit random number gives four of them."""
    device = generator.device
    most = min(out_N.numel(), _run(device))
    words = torch.empty(math.ceil(most / 4), dtype=torch.int64, device=device)
    index_N = torch.empty(most, dtype=torch.int32, device=device)
    for run_N in out_N.split(_run(device)):
        count = run_N.numel()
        words.random_(-(1 << 63), None, generator=generator)
        index_N[:count].copy_(words.view(torch.int16)[:count]).add_(TABLE // 2)
        torch.index_select(_table(table, device), 0, index_N[:count], out=run_N)


@cache
def _table(name: str, device: torch.device) -> Tensor:
    """Return TABLE values of a distribution at equal steps of probability; "codes": bytes of a real NF4 matrix."""
    if name == "codes":
        noise = torch.randn(TABLE // 32, 64, generator=torch.Generator().manual_seed(0))
        return NormalFloat4(double_quant=False).encode(noise).codes.to(device)
    probability = (torch.arange(TABLE, dtype=torch.float64) + 0.5) / TABLE
    if name == "maxima":  # of the magnitudes of a block of 64 Gaussian numbers
        values = math.sqrt(2) * torch.erfinv(probability ** (1 / 64))
    else:
        values = math.sqrt(2) * torch.erfinv(2 * probability - 1)
    if name == "t":
        values = _student(values)
    return values.float().to(device)


def _student(z: Tensor) -> Tensor:
    """Return quantiles of Student's t from Gaussian ones, scaled to deviation 1 (Abramowitz & Stegun, 26.7.5)."""
    t = z + (z**3 + z) / (4 * FREEDOM) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * FREEDOM**2)
    return t / t.std()


def _run(device: torch.device) -> int:
    return RUN_CPU if device.type == "cpu" else RUN_GPU
