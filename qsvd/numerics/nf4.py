"""NF4: sixteen levels, one scale for 64 weights, bit for bit as bitsandbytes stores it (arXiv:2305.14314, section 3).

On a GPU bitsandbytes' kernels encode. Those of kernels.py decode, or bitsandbytes' without Triton. On a CPU
bitsandbytes encodes slowly, so that codebook.py does it, and on AVX-512 machines it decodes wrongly if a block crosses
rows, so that it gets one block as a row.

Shape suffixes: O = out features, I = in features, B = blocks, E = elements of one block, N = elements of whole blocks.
"""

import logging
from functools import cache
from math import ceil, prod
from types import ModuleType

import torch
from torch import Tensor

from qsvd.numerics import codebook
from qsvd.numerics.codec import SMALLEST_SCALE, Codec, NestedScales, PackedBlocks, pack, plain_scales
from qsvd.numerics.normal_float import kernels_for

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # of bitsandbytes
NESTED_BLOCK = 256
RUN = 1 << 19  # elements encoded or decoded at a time: a few MB, which stay in the cache
ZERO = 7  # the code of zero, which fills the last byte

# Importing bitsandbytes, here or in PEFT, logs a warning about a kernel that qsvd does not call.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


@cache
def bitsandbytes() -> ModuleType:
    """Return bitsandbytes.functional. It is imported here, at the first use, because the import takes seconds."""
    import bitsandbytes.functional

    return bitsandbytes.functional


class NormalFloat4(Codec):
    """NF4 in blocks of `block_size`, with scales in float32 or, with double_quant, in 8 bits.

    Args:
        double_quant: Quantize the scales again.
        block_size: Elements that share a scale: a power of two from 32 to 4096. Only blocks of 64 have a name.

    Raises:
        ValueError: block_size is not one of bitsandbytes'.
    """

    FORMS = "nf4 or nf4+dq (bitsandbytes')"

    def __init__(self, *, double_quant: bool, block_size: int = 64):
        if block_size not in BLOCK_SIZES:
            raise ValueError(f"block size {block_size} is not one of bitsandbytes': a power of two from 32 to 4096")
        self.name = ("nf4" if block_size == 64 else f"nf4-{block_size}") + ("+dq" if double_quant else "")
        self.double_quant = double_quant
        self.block_size = block_size
        self.nested = (8, NESTED_BLOCK) if double_quant else None

    @classmethod
    def from_name(cls, name: str) -> "NormalFloat4 | None":
        return cls(double_quant=name == "nf4+dq") if name in ("nf4", "nf4+dq") else None

    def encode(self, matrix_OI: Tensor) -> PackedBlocks:
        self.check_encodable(matrix_OI)
        if matrix_OI.is_cuda:
            finite = torch.isfinite(matrix_OI).all()  # the kernel's maximum ignores a NaN
            codes, state = bitsandbytes().quantize_4bit(matrix_OI, blocksize=self.block_size, quant_type="nf4")
            codes, scales = codes.view(-1), state.absmax
        else:
            codes, scales = _encode_on_cpu(matrix_OI.contiguous().view(-1), self.block_size)
            finite = torch.isfinite(scales).all()
        if not finite:
            raise ValueError(f"{self.name} cannot encode a matrix that holds a NaN or an infinity")
        shape = (matrix_OI.shape[0], matrix_OI.shape[1])
        return PackedBlocks(codes, self.stored_scales(scales), shape, self)

    def stored_scales(self, scales_B: Tensor) -> Tensor | NestedScales:
        return nest(scales_B) if self.double_quant else scales_B

    def levels(self, device: torch.device) -> Tensor:
        return codebook.levels(4, device)

    def nearest(self, scaled_N: Tensor) -> Tensor:
        return codebook.nearest(scaled_N, 4)

    def decode(self, packed: PackedBlocks, dtype: torch.dtype) -> Tensor:
        if packed.codes.is_cuda or prod(packed.shape) % self.block_size:
            return super().decode(packed, dtype)
        return _decode_blocks(packed.codes, plain_scales(packed.scales), self.block_size, dtype).view(packed.shape)

    def decode_into(self, packed: PackedBlocks, out_OI: Tensor) -> None:
        if kernels := kernels_for(out_OI):
            kernels.decode_into(packed, out_OI.view(-1))
        elif out_OI.is_cuda:
            decode_with_bitsandbytes(packed, out_OI)
        else:
            _decode_on_cpu(packed.codes, plain_scales(packed.scales), self.block_size, out_OI.view(-1))


def decode_with_bitsandbytes(packed: PackedBlocks, out_OI: Tensor) -> None:
    """Write a matrix on a GPU into `out_OI` with bitsandbytes' kernel; the bits are those of kernels.py."""
    kind = {"blocksize": packed.codec.block_size, "quant_type": "nf4"}
    codes, scales_B = packed.codes.view(-1, 1), plain_scales(packed.scales)
    bitsandbytes().dequantize_4bit(codes, absmax=scales_B, out=out_OI, **kind)


def nest(scales_B: Tensor) -> NestedScales:
    """Quantize float32 block scales to 8 bits, as bitsandbytes' double quantization does."""
    offset = scales_B.mean()
    codes, state = bitsandbytes().quantize_blockwise(scales_B - offset, blocksize=NESTED_BLOCK)
    assert state.code is not None, "quantize_blockwise returns the levels it used"
    return NestedScales(codes, state.absmax, offset, state.code, NESTED_BLOCK)


def _encode_on_cpu(flat_N: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Return packed codes and scales of a matrix, in runs of whole blocks and then the short last block."""
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
        codes[start // 2 : stop // 2] = pack(codebook.nearest(scaled_BE.view(-1), 4), 4)
    if num_full < num_elements:  # bitsandbytes divides in the short last block, and stores a scale above zero
        short_E = flat_N[num_full:].float()
        scales[-1] = short_E.abs().max().clamp(min=SMALLEST_SCALE)
        codes[num_full // 2 :] = pack(codebook.nearest(short_E / scales[-1], 4), 4, filler=ZERO)
    return codes, scales


def _decode_on_cpu(codes: Tensor, scales_B: Tensor, block_size: int, out_N: Tensor) -> None:
    """Decode runs of whole blocks, and the short last block by table."""
    num_elements = out_N.numel()
    num_full = num_elements - num_elements % block_size
    for start in range(0, num_full, RUN):
        stop = min(start + RUN, num_full)
        scales = scales_B[start // block_size : stop // block_size]
        out_N[start:stop] = _decode_blocks(codes[start // 2 : stop // 2], scales, block_size, out_N.dtype)
    if num_full < num_elements:
        out_N[num_full:] = codebook.look_up(codes[num_full // 2 :], 4, num_elements - num_full) * scales_B[-1]


def _decode_blocks(codes: Tensor, scales_B: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    """Decode whole blocks to [N] in `dtype` with bitsandbytes, whose kernel is right if each block is a row."""
    state = bitsandbytes().QuantState(
        absmax=scales_B,
        shape=torch.Size((len(scales_B), block_size)),
        code=codebook.levels(4),
        blocksize=block_size,
        quant_type="nf4",
        dtype=dtype if dtype.itemsize < 8 else torch.float32,
    )
    return bitsandbytes().dequantize_4bit(codes.view(-1, 1), state).view(-1).to(dtype)
