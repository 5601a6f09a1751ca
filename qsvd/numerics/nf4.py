"""NF4: sixteen levels, one scale for 64 weights, bit for bit as bitsandbytes stores it (arXiv:2305.14314, section 3).

On a GPU bitsandbytes' kernels do the work. On a CPU they decode wrongly on AVX-512 machines where a block crosses rows,
so that they are given one block to a row; and they are slow to encode, which is done here by a table: a scaled weight,
rounded to half precision, is an index into 65,536 codes. Only the fifteen halves around a decision boundary need the
exact comparison.

Shape suffixes: B = blocks, E = elements of one block, N = elements of a run of blocks.
"""

import logging
from functools import cache
from math import ceil, prod

import numpy
import torch
from torch import Tensor

from qsvd.numerics.codec import Codec, NestedScales, PackedBlocks

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # warns of a kernel that qsvd never calls
import bitsandbytes.functional as bitsandbytes  # noqa: E402

NESTED_LEVELS = 256
NESTED_BLOCK = 256
RUN = 1 << 19  # elements worked on at a time: a few MB, which stay in cache
UNDECIDED = 255  # a half-precision value whose float32 neighbours have two different codes
SMALLEST_SCALE = 1e-38  # bitsandbytes divides by no less


class NormalFloat4(Codec):
    """NF4 in blocks of `block_size`, with the scales in float32 or, with double_quant, in 8 bits."""

    name = "nf4"

    def __init__(self, *, double_quant: bool, block_size: int = 64):
        if block_size not in (32, 64, 128, 256, 512, 1024, 2048, 4096):
            raise ValueError(f"block size {block_size} is not one of bitsandbytes': a power of two from 32 to 4096")
        self.double_quant = double_quant
        self.block_size = block_size

    def encode(self, matrix_OI: Tensor) -> PackedBlocks:
        """Round a matrix to NF4.

        Args:
            matrix_OI: float32, bfloat16 or float16 [O, I], finite.

        Raises:
            ValueError: matrix_OI has another dtype or number of dimensions, or holds a NaN or an infinity.
        """
        if matrix_OI.ndim != 2 or matrix_OI.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"NF4 encodes a float32, bfloat16 or float16 matrix, not {matrix_OI.dtype} {tuple(matrix_OI.shape)}"
            )
        if matrix_OI.is_cuda:
            finite = torch.isfinite(matrix_OI).all()  # the kernel's maximum passes over a NaN
            codes, state = bitsandbytes.quantize_4bit(matrix_OI, blocksize=self.block_size, quant_type="nf4")
            codes, scales = codes.view(-1), state.absmax
        else:
            codes, scales = _encode_on_cpu(matrix_OI.contiguous().view(-1), self.block_size)
            finite = torch.isfinite(scales).all()
        if not finite:
            raise ValueError("NF4 cannot encode a matrix that holds a NaN or an infinity")
        shape = (matrix_OI.shape[0], matrix_OI.shape[1])
        return PackedBlocks(codes, nest(scales) if self.double_quant else scales, shape, self)

    def decode(self, packed: PackedBlocks, dtype: torch.dtype) -> Tensor:
        if packed.codes.is_cuda or prod(packed.shape) % self.block_size:
            out_OI = torch.empty(packed.shape, dtype=dtype, device=packed.codes.device)
            self.decode_into(packed, out_OI)
            return out_OI
        return _decode_blocks(packed.codes, _plain(packed.scales), self.block_size, dtype).view(packed.shape)

    def decode_into(self, packed: PackedBlocks, out_OI: Tensor) -> None:
        scales_B = _plain(packed.scales)
        if out_OI.is_cuda:
            codes = packed.codes.view(-1, 1)
            kind = {"blocksize": self.block_size, "quant_type": "nf4"}
            bitsandbytes.dequantize_4bit(codes, absmax=scales_B, out=out_OI, **kind)
        else:
            _decode_on_cpu(packed.codes, scales_B, self.block_size, out_OI.view(-1))

    def parts(self, shape: tuple[int, int]) -> dict[str, int]:
        num_elements = prod(shape)
        num_blocks = ceil(num_elements / self.block_size)
        codes = {"codes": ceil(num_elements / 2)}
        if not self.double_quant:
            return codes | {"absmax": 4 * num_blocks}
        nested = {"absmax_codes": num_blocks, "absmax": 4 * ceil(num_blocks / NESTED_BLOCK)}
        return codes | nested | {"offset": 4, "levels": 4 * NESTED_LEVELS}


def nest(scales_B: Tensor) -> NestedScales:
    """Block scales in 8 bits, as bitsandbytes' double quantization stores them."""
    offset = scales_B.mean()
    codes, state = bitsandbytes.quantize_blockwise(scales_B - offset, blocksize=NESTED_BLOCK)
    assert state.code is not None, "quantize_blockwise returns the levels it used"
    return NestedScales(codes, state.absmax, offset, state.code, NESTED_BLOCK)


@cache
def levels() -> Tensor:
    """The sixteen levels of NF4, float32 [16], ascending from -1 to 1, the eighth an exact zero."""
    return bitsandbytes.get_4bit_type("nf4", device="cpu")


@cache
def _boundaries() -> Tensor:
    """Half-way points between levels, float32 [15]; a value on one takes the lower code."""
    return (levels()[:-1] + levels()[1:]) / 2


@cache
def _code_of_half() -> numpy.ndarray:
    """The code of each half-precision number, by its bits; UNDECIDED where its float32 neighbours differ."""
    halves = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    codes = torch.bucketize(halves.float(), _boundaries()).to(torch.uint8)
    codes[_boundaries().half().view(torch.uint16).long()] = UNDECIDED
    return codes.numpy()


@cache
def _levels_of_byte() -> numpy.ndarray:
    """The two levels that a byte stands for, as one 64-bit item: [256]."""
    byte = torch.arange(256)
    pairs = torch.stack((levels()[byte >> 4], levels()[byte & 15]), dim=1)
    return pairs.contiguous().view(torch.int64).view(-1).numpy()


def _encode_on_cpu(flat_N: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    num_elements = flat_N.numel()
    num_full = num_elements - num_elements % block_size
    codes = torch.empty(ceil(num_elements / 2), dtype=torch.uint8)
    scales = torch.empty(ceil(num_elements / block_size), dtype=torch.float32)
    for start in range(0, num_full, RUN):
        stop = min(start + RUN, num_full)
        blocks_BE = flat_N[start:stop].float().view(-1, block_size)
        absmax_B = blocks_BE.abs().amax(dim=1)
        scales[start // block_size : stop // block_size] = absmax_B
        scaled_BE = blocks_BE * absmax_B.clamp_(min=SMALLEST_SCALE).reciprocal_()[:, None]
        codes[start // 2 : stop // 2] = _pack(_codes_of(scaled_BE.view(-1)))
    if num_full < num_elements:  # bitsandbytes divides in the short last block, and stores a scale above zero
        short_E = flat_N[num_full:].float()
        scales[-1] = short_E.abs().max().clamp(min=SMALLEST_SCALE)
        codes[num_full // 2 :] = _pack(_codes_of(short_E / scales[-1]))
    return codes, scales


def _codes_of(scaled_N: Tensor) -> numpy.ndarray:
    """The code of each scaled weight, uint8 [N]."""
    codes = _code_of_half().take(scaled_N.half().view(torch.uint16).numpy())
    undecided = numpy.flatnonzero(codes == UNDECIDED)
    codes[undecided] = torch.bucketize(scaled_N[torch.from_numpy(undecided)], _boundaries()).numpy()
    return codes


def _pack(codes_N: numpy.ndarray) -> Tensor:
    """Two codes to a byte, uint8 [ceil(N / 2)], the first in the high half; an odd end takes the code of zero."""
    if codes_N.size % 2:
        codes_N = numpy.append(codes_N, _codes_of(torch.zeros(1)))
    return torch.from_numpy((codes_N[::2] << 4) | codes_N[1::2])


def _plain(scales: Tensor | NestedScales) -> Tensor:
    return scales.decode() if isinstance(scales, NestedScales) else scales


def _decode_on_cpu(codes: Tensor, scales_B: Tensor, block_size: int, out_N: Tensor) -> None:
    """Runs of whole blocks, and by table what a short last block holds."""
    num_elements = out_N.numel()
    num_full = num_elements - num_elements % block_size
    for start in range(0, num_full, RUN):
        stop = min(start + RUN, num_full)
        scales = scales_B[start // block_size : stop // block_size]
        out_N[start:stop] = _decode_blocks(codes[start // 2 : stop // 2], scales, block_size, out_N.dtype)
    if num_full < num_elements:
        pairs = torch.from_numpy(_levels_of_byte().take(codes.numpy()[num_full // 2 :])).view(torch.float32)
        out_N[num_full:] = pairs[: num_elements - num_full] * scales_B[-1]


def _decode_blocks(codes: Tensor, scales_B: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    """Whole blocks, [N] in `dtype`, by bitsandbytes: with one block to a row its kernel is right."""
    state = bitsandbytes.QuantState(
        absmax=scales_B,
        shape=torch.Size((len(scales_B), block_size)),
        code=levels(),
        blocksize=block_size,
        quant_type="nf4",
        dtype=dtype if dtype.itemsize < 8 else torch.float32,
    )
    return bitsandbytes.dequantize_4bit(codes.view(-1, 1), state).view(-1).to(dtype)
