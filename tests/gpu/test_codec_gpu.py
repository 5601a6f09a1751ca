"""NF4 on a GPU against the CPU, which is judged by bitsandbytes and the definition elsewhere."""

import numpy as np
import pytest
import torch

from qsvd.numerics.codec import NestedScales, PackedBlocks
from qsvd.numerics.nf4 import NormalFloat4, decode_with_bitsandbytes
from qsvd.numerics.normal_float import HAS_TRITON
from tests import reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

UNIT = 2.0**-24  # float32 rounds within this, relatively
# A scaled value is a product with a rounded reciprocal or a quotient: either is off by at most 2 UNIT, a boundary by 1.
# A value that both sides may round differently lies within the sum.
TIE = 2 * 3 * UNIT
CELL = 2 / 65536  # a table may find an 8-bit level to within one of its 65,536 cells over -1..1
SHAPES = ((64, 128), (256, 688), (172, 64), (3, 100), (5, 13), (1, 1), (1, 2), (2, 1), (1000, 1111))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def near_a_boundary(matrix):
    flat = matrix.double().numpy().reshape(-1)
    scaled = flat / reference.spread(reference.block_scales(matrix.double().numpy(), 64), flat.size, 64)
    distance = np.abs(scaled[:, None] - reference.BOUNDARIES)
    return (distance <= TIE * np.abs(reference.BOUNDARIES)).any(axis=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_codes_are_the_cpus_up_to_ties_and_scales_are_equal(shape, dtype, scale):
    matrix = (torch.from_numpy(reference.gaussian(*shape)) * scale).to(dtype)
    on_cpu, on_gpu = (NormalFloat4(double_quant=False).encode(one) for one in (matrix, matrix.cuda()))
    assert on_gpu.codes.is_cuda
    assert on_gpu.codes.shape == on_cpu.codes.shape
    assert torch.equal(on_gpu.scales.cpu(), on_cpu.scales)
    left, right = (
        reference.unpacked(packed.codes.cpu().numpy(), matrix.numel()).astype(int) for packed in (on_cpu, on_gpu)
    )
    assert (np.abs(left - right) <= near_a_boundary(matrix)).all()  # and then by one


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_is_the_cpus_to_the_bit(shape, double_quant):
    matrix = torch.from_numpy(reference.gaussian(*shape))
    codec = NormalFloat4(double_quant=double_quant)
    packed = codec.encode(matrix)
    scales = packed.scales.decode() if isinstance(packed.scales, NestedScales) else packed.scales
    moved = PackedBlocks(packed.codes.cuda(), scales.cuda(), packed.shape, codec)
    assert moved.decode().shape == shape
    assert torch.equal(moved.decode().cpu(), packed.decode())
    buffer = torch.empty(shape, device="cuda")
    moved.decode(out=buffer)
    assert torch.equal(buffer.cpu(), packed.decode())


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_decode_to_bitsandbytes_bits(dtype, double_quant, monkeypatch):
    from qsvd.numerics import kernels

    done, launch = [], kernels._launch
    monkeypatch.setattr(kernels, "_launch", lambda *a: done.append(a[0]) or launch(*a))
    for shape in (*SHAPES, (4096, 688)):
        packed = NormalFloat4(double_quant=double_quant).encode(torch.from_numpy(reference.gaussian(*shape)).cuda())
        out, theirs = (torch.empty(shape, dtype=dtype, device="cuda") for _ in range(2))
        packed.decode(out=out)
        assert done == [kernels._decode]
        decode_with_bitsandbytes(packed, theirs)
        assert torch.equal(out, theirs)
        bands = [band.decode(dtype=dtype) for _, band in packed.in_rows(out.numel() // 3)]
        assert torch.equal(torch.cat(bands), out)
        done.clear()


@pytest.mark.parametrize("shape", [(64, 128), (300, 65), (600, 64)])
def test_double_quantized_scales_are_rounded_to_the_nearest_of_the_dynamic_map(shape):
    matrix = torch.from_numpy(reference.gaussian(*shape))
    packed = NormalFloat4(double_quant=True).encode(matrix.cuda())
    scales = reference.block_scales(matrix.numpy(), 64)
    decoded = packed.scales.decode().cpu().numpy()
    nearest = np.abs(reference.nest(scales) - scales)
    slack = CELL * np.abs(scales - scales.mean()).max() + 8 * UNIT * scales.max()
    assert (np.abs(decoded - scales) <= nearest + slack).all()
    indices = reference.unpacked(packed.codes.cpu().numpy(), matrix.numel())
    by_definition = reference.nf4_decode(indices, decoded, shape).astype(np.float32)
    assert np.array_equal(packed.decode().cpu().numpy(), by_definition)
    assert packed.num_bytes == NormalFloat4(double_quant=True).num_bytes(shape)


def test_zero_blocks_decode_to_zero():
    matrix = torch.from_numpy(reference.gaussian(8, 64))
    matrix[::2] = 0
    decoded = NormalFloat4(double_quant=False).encode(matrix.cuda()).decode().cpu()
    assert (decoded[::2] == 0).all()
    assert (decoded[1::2] != 0).any()
    assert (NormalFloat4(double_quant=False).encode(torch.zeros(5, 13).cuda()).decode() == 0).all()


def test_a_non_contiguous_matrix_encodes_like_its_copy():
    wide = torch.from_numpy(reference.gaussian(90, 140)).cuda()
    for view in (wide.mT, wide[:, 5:70]):
        ours, copied = (NormalFloat4(double_quant=False).encode(one) for one in (view, view.contiguous()))
        assert torch.equal(ours.codes, copied.codes)
        assert torch.equal(ours.decode(), copied.decode())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 70, 149])
def test_a_nan_or_infinity_anywhere_is_refused(bad, place):
    matrix = torch.from_numpy(reference.gaussian(3, 50))
    matrix.view(-1)[place] = bad
    with pytest.raises(ValueError, match="cannot encode a matrix that holds a NaN or an infinity"):
        NormalFloat4(double_quant=False).encode(matrix.cuda())
