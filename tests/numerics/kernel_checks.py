"""Triton's kernels without a GPU, in a process of their own: test_kernels.py starts it.

interpret   they run in Triton's interpreter, on CPU tensors, and give what torch's operations give
compile     they are compiled for a GPU that need not be there, as they would be launched
"""

import sys
from dataclasses import replace
from itertools import product

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qsvd.numerics import kernels, nf4
from qsvd.numerics.codec import NestedScales
from qsvd.numerics.int4 import Int4
from qsvd.numerics.nf4 import NormalFloat4
from qsvd.numerics.normal_float import BLOCK_SIZES, SMALLEST_SCALE, Nesting, NormalFloat
from tests import reference
from tests.numerics import column_checks

BITS = (2, 3, 4, 8)
SCALES = (
    *(torch.float32, torch.float16, torch.bfloat16),
    *(Nesting(2, 16), Nesting(3, 16), Nesting(4, 64), Nesting(8, 256), Nesting(3, 256)),
)
SHAPES = ((1, 1), (7, 9), (5, 100), (129, 133))  # short last blocks and bytes; five programs in the last
NF4 = (*((shape, 64) for shape in (*SHAPES, (300, 128))), ((8, 100), 32), ((11, 700), 4096))
INT4 = ((32, (7, 96)), (64, (129, 192)), (128, (5, 128)))  # group and shape; five programs in the second
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
POINTERS = {
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
}


def matrix(shape, seed):
    """Rows that differ in size, zeros, and numbers as small as there are."""
    found = torch.from_numpy(reference.gaussian(*shape, seed=seed)) * torch.logspace(-3, 3, shape[0])[:, None]
    found.view(-1)[20:60] = 0
    found.view(-1)[200:240] *= 1e-42
    return found


def wanted_output(decoded, dtype):
    """A float32 matrix in another dtype; Triton's interpreter cuts bfloat16 off instead of rounding it."""
    if dtype == torch.bfloat16:
        return decoded.view(torch.int32).bitwise_and(-65536).view(torch.float32).bfloat16()
    return decoded.to(dtype)


def decoded_right(codec, shape, seed, dtypes=DTYPES):
    packed = codec.encode(matrix(shape, seed))
    for dtype in dtypes:
        out = torch.full((packed.shape[0] * packed.shape[1],), torch.nan, dtype=dtype)
        kernels.decode_into(packed, out)
        assert torch.equal(out.view(shape), wanted_output(packed.decode(), dtype)), (codec.name, shape, dtype)


def bitsandbytes_decoded(packed):
    """What bitsandbytes decodes. The last block is filled up, and each is a row: its CPU kernel needs that."""
    functional, scales, size = nf4.bitsandbytes(), packed.scales, packed.codec.block_size
    state = functional.QuantState(absmax=scales, blocksize=size, quant_type="nf4", dtype=torch.float32)
    if isinstance(scales, NestedScales):
        state.absmax, state.offset, state.nested = scales.codes, scales.offset, True
        state.state2 = functional.QuantState(
            absmax=scales.absmax, blocksize=scales.block_size, code=scales.levels, dtype=torch.float32
        )
    num_elements, num_blocks = packed.shape[0] * packed.shape[1], len(state.absmax)
    state.shape = torch.Size((num_blocks, size))
    codes = torch.zeros(num_blocks * size // 2, 1, dtype=torch.uint8)
    codes[: len(packed.codes), 0] = packed.codes
    return functional.dequantize_4bit(codes, state).reshape(-1)[:num_elements].view(packed.shape)


def nf4_right(codec, shape, seed):
    """Through `decode`, whole, in bands, and from codes that are not aligned."""
    packed = codec.encode(matrix(shape, seed))
    decoded = bitsandbytes_decoded(packed)
    for dtype in DTYPES:
        out = torch.full(shape, torch.nan, dtype=dtype)
        assert torch.equal(packed.decode(out=out), wanted_output(decoded, dtype)), (codec.name, shape, dtype)
    shifted = replace(packed, codes=torch.cat((packed.codes[:2], packed.codes))[2:])
    assert torch.equal(shifted.decode(out=torch.empty(shape)), decoded)
    for rows, band in packed.in_rows(shape[0] * shape[1] // 2):
        assert torch.equal(band.decode(out=torch.empty(band.shape)), decoded[rows])


def int4_right():
    """Also from codes that are not aligned, which the kernel reads byte by byte; the number of comparisons."""
    for group, shape in INT4:
        decoded_right(Int4(group), shape, group)
        packed = Int4(group).encode(matrix(shape, group))
        shifted, out = replace(packed, codes=torch.cat((packed.codes[:2], packed.codes))[2:]), torch.empty(shape)
        kernels.decode_into(shifted, out.view(-1))
        assert torch.equal(out, packed.decode())
    return len(INT4)


def encoded_right(codec, shape, seed):
    for dtype in DTYPES:
        flat = matrix(shape, seed).to(dtype).view(-1)
        largest = codec._largest(flat)
        assert torch.equal(kernels.largest(flat, codec.block_size), largest), (codec.block_size, shape, dtype)
        inverse = largest.sign() / largest.clamp(min=SMALLEST_SCALE)
        found = kernels.nearest_codes(flat, inverse, codec.bits, codec.block_size)
        assert torch.equal(found, codec._codes(flat, largest)), (codec.name, shape, dtype)


def boundaries_go_down(bits):
    """A value on a boundary takes the lower code."""
    codec = NormalFloat(bits=bits, block_size=16)
    between = kernels.codebook.boundaries(bits, torch.device("cpu"))
    flat = torch.ones(len(between), 16)
    flat[:, 1], flat[:, 2] = between, torch.nextafter(between, torch.tensor(1.0))
    packed = codec.encode(flat)
    assert torch.equal(kernels.nearest_codes(flat.view(-1), torch.ones(len(between)), bits, 16), packed.codes)


def interpret():
    """Every width with every kind of scale; block, shape and dtype in turns; the number of comparisons."""
    count = int4_right() + column_checks.interpret()
    for bits in BITS:
        for number, scales in enumerate(SCALES):
            codec = NormalFloat(bits=bits, block_size=BLOCK_SIZES[(number + bits) % 4], scales=scales)
            dtype = DTYPES[count % len(DTYPES)]
            decoded_right(codec, SHAPES[(number + number // 4 + bits) % 4], number, (dtype,))
            count += 1
        for block_size, shape in zip(BLOCK_SIZES, SHAPES, strict=True):
            encoded_right(NormalFloat(bits=bits, block_size=block_size), shape, bits)
            count += 1
        boundaries_go_down(bits)
    nf4.kernels_for = lambda _: kernels
    for double_quant, (shape, block_size) in product((False, True), NF4):
        nf4_right(NormalFloat4(double_quant=double_quant, block_size=block_size), shape, block_size)
        count += 1
    for broken in (torch.nan, torch.inf, -torch.inf):
        flat = torch.ones(100)
        flat[70] = broken
        assert torch.isfinite(kernels.largest(flat, 32)).tolist() == [True, True, False, True]
    for nothing in (torch.empty(0), torch.empty(0).bfloat16()):
        assert kernels.nearest_codes(nothing, kernels.largest(nothing, 16), 3, 16).numel() == 0
    return count


class Compiled:
    """In the place of a kernel: what a launch would compile, as PTX."""

    def __init__(self, kernel):
        self.kernel, self.found = kernel, []

    def __getitem__(self, grid):
        assert len(grid) == 1
        return self.launch

    def launch(self, *arguments, enable_fp_fusion, num_warps=4, **kinds):
        names = self.kernel.arg_names
        sizes = {name: value for name, value in zip(names, arguments, strict=False) if isinstance(value, int)}
        constants = kinds | {name: value for name, value in sizes.items() if value == 1}  # as Triton takes them
        kind_of = dict.fromkeys(names, "i32") | dict.fromkeys(constants, "constexpr")
        for name, value in zip(names, arguments, strict=False):
            kind_of[name] = POINTERS[value.dtype] if torch.is_tensor(value) else kind_of[name]
        places = {(names.index(name),): value for name, value in constants.items()}
        numbers = [value.data_ptr() if torch.is_tensor(value) else value for value in arguments]
        sixteens = {(place,): [["tt.divisibility", 16]] for place, number in enumerate(numbers) if number % 16 == 0}
        source = ASTSource(self.kernel, kind_of, constexprs=places, attrs=sixteens)
        options = {"enable_fp_fusion": enable_fp_fusion, "num_warps": num_warps}
        self.found.append(triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options).asm["ptx"])


def compiled():
    """Every kernel, each width; no product is fused with a sum, nothing small becomes zero, casts round to nearest."""
    kernels._decode, kernels._encode, kernels._largest = map(
        Compiled, (kernels._decode, kernels._encode, kernels._largest)
    )
    for number, bits in enumerate(BITS):
        weight = matrix((8, 100) if number % 2 else (1, 1), 0).bfloat16()
        packed = NormalFloat(bits=bits, scales=(torch.bfloat16, Nesting(3, 16))[number % 2]).encode(weight)
        kernels.decode_into(packed, torch.empty(weight.numel(), dtype=torch.bfloat16))
        kernels.nearest_codes(weight.reshape(-1).clone(), torch.ones(13), bits, 64)
    kernels.largest(weight.reshape(-1), 64)
    for double_quant in (False, True):
        packed = NormalFloat4(double_quant=double_quant).encode(matrix((8, 100), 0))
        kernels.decode_into(packed, torch.empty(800, dtype=torch.bfloat16))
        text = kernels._decode.found[-1]
        assert "ld.global.v4.b32" in text, "codes are loaded in pieces of 16 bytes"
        assert "st.global.b" not in text, "and 16 bytes are stored at a time"
    kernels.decode_into(Int4(32).encode(matrix((8, 96), 0)), torch.empty(768, dtype=torch.bfloat16))
    assert "ld.global.v4.b32" in kernels._decode.found[-1]
    found = [*kernels._decode.found, *kernels._encode.found, *kernels._largest.found]
    assert not [text for text in found if "fma" in text or ".ftz" in text]
    assert all("cvt.rn.bf16" in text for text in kernels._decode.found)
    return len(found) + column_checks.compiled(Compiled)


if __name__ == "__main__":
    sys.stdout.write(str({"interpret": interpret, "compile": compiled}[sys.argv[1]]()))
