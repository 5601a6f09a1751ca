"""Triton's kernels without a GPU, in a process of their own: test_kernels.py starts it.

interpret   they run in Triton's interpreter, on CPU tensors, and give what torch's operations give
compile     they are compiled for a GPU that need not be there, as they would be launched
"""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qsvd.numerics import kernels
from qsvd.numerics.normal_float import BLOCK_SIZES, SMALLEST_SCALE, Nesting, NormalFloat
from tests import reference

BITS = (2, 3, 4, 8)
SCALES = (
    *(torch.float32, torch.float16, torch.bfloat16),
    *(Nesting(2, 16), Nesting(3, 16), Nesting(4, 64), Nesting(8, 256), Nesting(3, 256)),
)
SHAPES = ((1, 1), (7, 9), (5, 100), (129, 133))  # short last blocks and bytes; five programs in the last
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
POINTERS = {torch.uint8: "*u8", torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


def matrix(shape, seed):
    """Rows that differ in size, zeros, and numbers as small as there are."""
    found = torch.from_numpy(reference.gaussian(*shape, seed=seed)) * torch.logspace(-3, 3, shape[0])[:, None]
    found.view(-1)[20:60] = 0
    found.view(-1)[200:240] *= 1e-42
    return found


def wanted_output(packed, dtype):
    """What torch's operations decode; Triton's interpreter cuts bfloat16 off instead of rounding it."""
    decoded = packed.decode()
    if dtype == torch.bfloat16:
        return decoded.view(torch.int32).bitwise_and(-65536).view(torch.float32).bfloat16()
    return decoded.to(dtype)


def decoded_right(codec, shape, seed):
    packed = codec.encode(matrix(shape, seed))
    for dtype in DTYPES:
        out = torch.full((packed.shape[0] * packed.shape[1],), torch.nan, dtype=dtype)
        kernels.decode_into(packed, out)
        assert torch.equal(out.view(shape), wanted_output(packed, dtype)), (codec.name, codec.block_size, shape, dtype)


def encoded_right(codec, shape, seed):
    for dtype in DTYPES:
        flat = matrix(shape, seed).to(dtype).view(-1)
        largest = codec._largest(flat)
        assert torch.equal(kernels.largest(flat, codec.block_size), largest), (codec.block_size, shape, dtype)
        inverse = largest.sign() / largest.clamp(min=SMALLEST_SCALE)
        found = kernels.nearest_codes(flat, inverse, codec.bits, codec.block_size)
        assert torch.equal(found, codec._codes(flat, largest)), (codec.name, codec.block_size, shape, dtype)


def boundaries_go_down(bits):
    """A value on a boundary takes the lower code."""
    codec = NormalFloat(bits=bits, block_size=16)
    between = kernels.codebook.boundaries(bits, torch.device("cpu"))
    flat = torch.ones(len(between), 16)
    flat[:, 1], flat[:, 2] = between, torch.nextafter(between, torch.tensor(1.0))
    packed = codec.encode(flat)
    assert torch.equal(kernels.nearest_codes(flat.view(-1), torch.ones(len(between)), bits, 16), packed.codes)


def interpret():
    """Every width with every kind of scale, block and shape in turns; the number of comparisons."""
    count = 0
    for bits in BITS:
        for number, scales in enumerate(SCALES):
            codec = NormalFloat(bits=bits, block_size=BLOCK_SIZES[(number + bits) % 4], scales=scales)
            for shape in SHAPES[number % 2 :: 2]:
                decoded_right(codec, shape, number)
                count += 1
        for block_size, shape in zip(BLOCK_SIZES, SHAPES, strict=True):
            encoded_right(NormalFloat(bits=bits, block_size=block_size), shape, bits)
            count += 1
        boundaries_go_down(bits)
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

    def launch(self, *arguments, enable_fp_fusion, **kinds):
        names = self.kernel.arg_names
        sizes = {name: value for name, value in zip(names, arguments, strict=False) if isinstance(value, int)}
        constants = kinds | {name: value for name, value in sizes.items() if value == 1}  # as Triton takes them
        kind_of = dict.fromkeys(names, "i32") | dict.fromkeys(constants, "constexpr")
        for name, value in zip(names, arguments, strict=False):
            kind_of[name] = POINTERS[value.dtype] if torch.is_tensor(value) else kind_of[name]
        places = {(names.index(name),): value for name, value in constants.items()}
        source = ASTSource(self.kernel, kind_of, constexprs=places)
        options = {"enable_fp_fusion": enable_fp_fusion}
        self.found.append(triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options).asm["ptx"])


def compiled():
    """Every kernel, each width; no product is fused with a sum, nothing small becomes zero, casts round to nearest."""
    kernels._decode, kernels._encode, kernels._largest = map(
        Compiled, (kernels._decode, kernels._encode, kernels._largest)
    )
    for bits, shape in zip(BITS, ((8, 100), (1, 1), (8, 100), (1, 1)), strict=True):
        weight = matrix((8, 100), 0)[: shape[0], : shape[1]].bfloat16()
        for scales in (torch.bfloat16, Nesting(3, 16)):
            packed = NormalFloat(bits=bits, scales=scales).encode(weight)
            kernels.decode_into(packed, torch.empty(weight.numel(), dtype=torch.bfloat16))
        flat = weight.reshape(-1)
        kernels.nearest_codes(flat, kernels.largest(flat, BLOCK_SIZES[BITS.index(bits)]), bits, 64)
    found = [*kernels._decode.found, *kernels._encode.found, *kernels._largest.found]
    assert not [text for text in found if "fma" in text or ".ftz" in text]
    assert all("cvt.rn.bf16" in text for text in kernels._decode.found)
    return len(found)


if __name__ == "__main__":
    sys.stdout.write(str({"interpret": interpret, "compile": compiled}[sys.argv[1]]()))
