"""The codecs on CUDA in Triton: decode in one kernel, encode NormalFloat in two.

The bits are those of torch's operations, and of bitsandbytes' kernels. A program works on groups of 8 codes, which fill
`bits` whole bytes at any width; a group lies within one block. Only normal_float.py imports this file, if Triton is
installed.

Decoding to 16 bits is bound by memory. A thread loads the 4 bytes of a group of 4-bit codes in one piece and stores 16
bytes, neighbours of what the threads beside it load and store. Levels and scales come from the cache: for 8 numbers 8
loads of levels, and 1 load of a scale or 2 of a nested one.

Shape suffixes: B = blocks, E = elements of one block, N = all elements, G = groups of a program, C = codes of a group.
"""

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]  # comes with torch where CUDA does
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from qsvd.numerics import codebook
from qsvd.numerics.codec import NestedScales, PackedBlocks, packed_bytes

GROUPS = 512  # of 8 codes, for each program
BLOCKS = 64  # for each program


def decode_into(packed: PackedBlocks, out_N: Tensor) -> None:
    """Write the matrix into `out_N`: levels times scales in float32, rounded once.

    Args:
        out_N: float32, bfloat16 or float16, contiguous.
    """
    scales, bits = packed.scales, packed.codec.bits
    nested = scales if isinstance(scales, NestedScales) else None
    given = (scales,) * 4 if isinstance(scales, Tensor) else (scales.codes, scales.absmax, scales.offset, scales.levels)
    kinds = {
        "BITS": bits,
        "BLOCK": packed.codec.block_size,
        "SCALE_BITS": nested.levels.numel().bit_length() - 1 if nested else 0,
        "SCALE_BLOCK": nested.block_size if nested else 0,
        "LOW_FIRST": int(packed.codec.low_first),
    }
    codes, levels = _words(packed.codes) if bits == 4 else packed.codes, packed.codec.levels(out_N.device)
    tensors = (out_N, codes, levels, *given)
    sizes = (out_N.numel(), packed.codes.numel(), given[0].numel())
    launch(_decode, -(-out_N.numel() // (8 * GROUPS)), (*tensors, *sizes), kinds | {"ROWS": GROUPS})


def _words(codes: Tensor) -> Tensor:
    """Return bytes as int32, 4 at a time; the bytes if they are not aligned for it or do not fill the last one."""
    return codes if codes.numel() % 4 or codes.storage_offset() % 4 else codes.view(torch.int32)


def largest(flat_N: Tensor, block_size: int) -> Tensor:
    """Return the largest magnitude of each block, float32 [B]; NaN if the block holds one.

    Args:
        flat_N: float32, bfloat16 or float16, contiguous.
    """
    count = -(-flat_N.numel() // block_size)
    largest_B = torch.empty(count, dtype=torch.float32, device=flat_N.device)
    kinds = {"BLOCK": block_size, "ROWS": BLOCKS}
    launch(_largest, -(-count // BLOCKS), (largest_B, flat_N, flat_N.numel()), kinds)
    return largest_B


def nearest_codes(flat_N: Tensor, inverse_B: Tensor, bits: int, block_size: int) -> Tensor:
    """Return the packed codes of the nearest levels, uint8 [ceil(N * bits / 8)]; zero's code fills the last byte.

    Args:
        flat_N: float32, bfloat16 or float16, contiguous, finite.
        inverse_B: float32, 1 / scale of each block.
    """
    codes = torch.empty(packed_bytes(flat_N.numel(), bits), dtype=torch.uint8, device=flat_N.device)
    arguments = (codes, flat_N, inverse_B, codebook.boundaries(bits, flat_N.device), flat_N.numel(), codes.numel())
    kinds = {"BITS": bits, "BLOCK": block_size, "ROWS": GROUPS}
    launch(_encode, -(-flat_N.numel() // (8 * GROUPS)), arguments, kinds)
    return codes


def launch(kernel: Any, programs: int, arguments: tuple[Any, ...], kinds: dict[str, int]) -> None:
    if programs:
        # unlike torch's operations, kernels do not choose the device of their tensors
        with torch.cuda.device_of(arguments[0]):
            # torch rounds a product and then a sum; fused they would be rounded once
            kernel[(programs,)](*arguments, **kinds, enable_fp_fusion=False)


@triton.jit
def _decode(  # noqa: PLR0913  # tensors are pointers here, each with its own argument
    out,
    codes,
    levels,
    scales,
    absmax,
    offset,
    scale_levels,
    num_elements,
    num_bytes,
    num_scale_bytes,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALE_BITS: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    LOW_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write out[n] = levels[codes[n]] * scales[n // BLOCK]; with SCALE_BITS, scales are codes of those bits."""
    group_G = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at_GC = group_G[:, None] * 8 + tl.arange(0, 8)[None, :]
    code_GC = _unpacked(codes, group_G, num_bytes, BITS, LOW_FIRST)
    block_G = group_G * 8 // BLOCK
    is_in_G = group_G * 8 < num_elements
    if SCALE_BITS == 0:
        scale_G = tl.load(scales + block_G, mask=is_in_G, other=0).to(tl.float32)
    else:
        scale_code_G = _code_at(scales, block_G, num_scale_bytes, SCALE_BITS)
        largest_G = tl.load(absmax + block_G // SCALE_BLOCK, mask=is_in_G, other=0)
        scale_G = tl.load(scale_levels + scale_code_G) * largest_G + tl.load(offset)
    value_GC = tl.load(levels + code_GC) * scale_G[:, None]
    tl.store(out + at_GC, value_GC.to(out.dtype.element_ty), mask=at_GC < num_elements)


@triton.jit
def _unpacked(codes, group_G, num_bytes, BITS: tl.constexpr, LOW_FIRST: tl.constexpr):
    """Return the codes of groups, int32 [G, 8]; 0 after the last byte. LOW_FIRST: a byte has its first code last."""
    place_C = tl.arange(0, 8) ^ LOW_FIRST
    if BITS == 8:
        at_GC = group_G[:, None] * 8 + place_C[None, :]
        code_GC = tl.load(codes + at_GC, mask=at_GC < num_bytes, other=0).to(tl.int32)
    elif codes.dtype.element_ty == tl.int32:  # the first byte is the lowest; its high half is the first code
        word_G = tl.load(codes + group_G, mask=group_G < num_bytes // 4, other=0)
        code_GC = word_G[:, None] >> (place_C // 2 * 8 + (1 - place_C % 2) * 4)[None, :] & 15
    else:
        word_G = tl.zeros([group_G.shape[0]], tl.int32)  # the group's bytes as one number
        for byte in tl.static_range(BITS):
            at_G = group_G * BITS + byte
            word_G = word_G << 8 | tl.load(codes + at_G, mask=at_G < num_bytes, other=0).to(tl.int32)
        code_GC = word_G[:, None] >> (BITS * (7 - place_C))[None, :] & ((1 << BITS) - 1)
    return code_GC


@triton.jit
def _code_at(codes, index, num_bytes, BITS: tl.constexpr):
    """Return single codes, int32, from the two bytes that they may lie in; 0 after the last byte."""
    first = index * BITS // 8
    code = tl.load(codes + first, mask=first < num_bytes, other=0).to(tl.int32)
    if BITS != 8:
        low = tl.load(codes + first + 1, mask=first + 1 < num_bytes, other=0).to(tl.int32)
        shift = 16 - BITS - (index * BITS % 8).to(tl.int32)
        code = (code << 8 | low) >> shift & ((1 << BITS) - 1)
    return code


@triton.jit
def _largest(out, matrix, num_elements, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Write out[b] = the largest magnitude of block b, or NaN."""
    block_B = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at_BE = block_B[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    value_BE = tl.load(matrix + at_BE, mask=at_BE < num_elements, other=0).to(tl.float32)
    is_nan_B = tl.max((value_BE != value_BE).to(tl.int32), axis=1) > 0
    largest_B = tl.where(is_nan_B, float("nan"), tl.max(tl.abs(value_BE), axis=1))
    tl.store(out + block_B, largest_B, mask=block_B * BLOCK < num_elements)


@triton.jit
def _encode(  # noqa: PLR0913  # as in _decode
    codes,
    matrix,
    inverse,
    boundaries,
    num_elements,
    num_bytes,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write groups of codes: the number of boundaries below each scaled value, found by bisection."""
    group_G = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place_C = tl.arange(0, 8)
    at_GC = group_G[:, None] * 8 + place_C[None, :]
    is_in_GC = at_GC < num_elements
    value_GC = tl.load(matrix + at_GC, mask=is_in_GC, other=0).to(tl.float32)
    inverse_G = tl.load(inverse + group_G * 8 // BLOCK, mask=group_G * 8 < num_elements, other=0)
    scaled_GC = value_GC * inverse_G[:, None]
    code_GC = tl.zeros([ROWS, 8], tl.int32)
    for bit in tl.static_range(BITS - 1, -1, -1):
        half_GC = tl.load(boundaries + code_GC + ((1 << bit) - 1))
        code_GC += tl.where(scaled_GC > half_GC, 1 << bit, 0)
    code_GC = tl.where(is_in_GC, code_GC, (1 << (BITS - 1)) - 1)
    if BITS == 8:
        tl.store(codes + at_GC, code_GC.to(tl.uint8), mask=is_in_GC)
    else:
        word_G = tl.sum(code_GC << (BITS * (7 - place_C))[None, :], axis=1)
        for byte in tl.static_range(BITS):
            at_G = group_G * BITS + byte
            tl.store(codes + at_G, (word_G >> (8 * (BITS - 1 - byte)) & 255).to(tl.uint8), mask=at_G < num_bytes)
