"""NormalFloat of any bits on a GPU against the CPU, which is judged by the definition elsewhere; and its two ways,
Triton's kernels and torch's operations, against each other.
"""

import pytest
import torch

from qsvd.numerics import normal_float
from qsvd.numerics.normal_float import BLOCK_SIZES, Nesting, NormalFloat
from tests import normal_floats, reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPES = ((64, 128), (172, 64), (3, 100), (5, 13), (1, 1), (1000, 1111))
SCALES = (torch.float32, torch.float16, torch.bfloat16, Nesting(3, 16), Nesting(8, 256))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
needs_triton = pytest.mark.skipif(not normal_float.HAS_TRITON, reason="needs Triton")


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("bits", normal_floats.BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_scales_and_levels_are_the_cpus(shape, bits, scales):
    """The same float32 operations, each rounded alike; of a million values one may lie within its last bit of a tie."""
    matrix = torch.from_numpy(reference.gaussian(*shape))
    codec = NormalFloat(bits=bits, block_size=32, scales=scales)
    on_cpu, on_gpu = codec.encode(matrix), codec.encode(matrix.cuda())
    assert on_gpu.codes.is_cuda
    assert (on_gpu.codes.cpu() != on_cpu.codes).sum() <= 1 + 1e-6 * matrix.numel()
    moved = on_cpu.to(torch.device("cuda"))
    for dtype in DTYPES:
        assert torch.equal(moved.decode(dtype=dtype).cpu(), on_cpu.decode(dtype=dtype))
    assert {name: t.nbytes for name, t in on_gpu.tensors().items()} == codec.parts(shape)


def both_ways(monkeypatch, work):
    """What it returns with Triton's kernels, and with torch's operations."""
    with_kernels = work()
    with monkeypatch.context() as patch:
        patch.setattr(normal_float, "HAS_TRITON", False)
        return with_kernels, work()


def hard(shape, dtype):
    """Rows that differ in size, zeros, and numbers as small as the dtype has."""
    matrix = torch.from_numpy(reference.gaussian(*shape)) * torch.logspace(-3, 3, shape[0])[:, None]
    matrix.view(-1)[20:60] = 0
    matrix.view(-1)[200:240] *= 1e-42 if dtype != torch.float16 else 1e-7
    return matrix.to(dtype).cuda()


KERNELS = [  # every pair of bits, scales, dtype and block size; Triton compiles each combination for some seconds
    pytest.param(bits, scales, DTYPES[turn % 3], BLOCK_SIZES[turn % 2 :: 2], id=f"{bits}-{scales}")
    for row, bits in enumerate(normal_floats.BITS)
    for turn, scales in enumerate(SCALES, start=row)
]


@needs_triton
@pytest.mark.parametrize(("bits", "scales", "dtype", "block_sizes"), KERNELS)
def test_kernels_and_torchs_operations_give_the_same_bits(bits, scales, dtype, block_sizes, monkeypatch):
    for block_size in block_sizes:
        for shape in SHAPES:
            codec, matrix = NormalFloat(bits=bits, block_size=block_size, scales=scales), hard(shape, dtype)
            ours, plain = both_ways(monkeypatch, lambda c=codec, m=matrix: c.encode(m))
            for name, tensor in plain.tensors().items():
                assert torch.equal(ours.tensors()[name], tensor), (name, shape, block_size)
            decoded, expected = both_ways(monkeypatch, lambda p=plain: p.decode(dtype=dtype))
            assert torch.equal(decoded, expected)
            bands = [band.decode(dtype=dtype) for _, band in plain.in_rows(shape[1])]
            assert torch.equal(torch.cat(bands), expected)


@needs_triton
@pytest.mark.parametrize("bits", normal_floats.BITS)
def test_a_matrix_of_more_elements_than_32_bits_count_decodes_like_its_parts(bits):
    """Its codes are those of a short one again and again."""
    rows, columns = (1 << 17) + 1, 1 << 14
    if torch.cuda.mem_get_info()[0] < 2 * rows * columns + rows * columns * bits // 8 + (2 << 30):
        pytest.skip("needs 10 GB of free GPU memory")
    packed = NormalFloat(bits=bits).encode(hard((1, columns), torch.float32))
    codes, scales = packed.codes.repeat(rows), packed.scales.repeat(rows)
    decoded = normal_float.PackedBlocks(codes, scales, (rows, columns), packed.codec).decode(dtype=torch.float16)
    assert (decoded == packed.decode(dtype=torch.float16)).all()


@needs_triton
def test_with_triton_kernels_do_the_work_and_none_is_started_for_nothing(monkeypatch):
    from qsvd.numerics import kernels

    done, launch = [], kernels._launch
    monkeypatch.setattr(kernels, "_launch", lambda *a: done.append(a[0]) or launch(*a))
    for shape in ((5, 100), (0, 64)):
        done.clear()
        NormalFloat(bits=3).encode(torch.ones(shape).cuda()).decode(dtype=torch.bfloat16)
        assert done == [kernels._largest, kernels._encode, kernels._decode]


@needs_triton
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_what_cannot_be_encoded_is_refused_by_both(broken, monkeypatch):
    matrix = torch.ones(5, 100).cuda()
    matrix[3, 7] = broken

    def refused():
        with pytest.raises(ValueError, match="holds a NaN or an infinity"):
            NormalFloat(bits=3).encode(matrix)

    both_ways(monkeypatch, refused)
