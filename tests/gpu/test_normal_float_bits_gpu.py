"""NormalFloat of any bits on a GPU against the CPU, which is judged by the definition elsewhere."""

import pytest
import torch

from qsvd.numerics.normal_float_bits import Nesting, NormalFloat
from tests import normal_floats, reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPES = ((64, 128), (172, 64), (3, 100), (5, 13), (1, 1), (1000, 1111))


@pytest.mark.parametrize("scales", [torch.float32, torch.float16, torch.bfloat16, Nesting(3, 16), Nesting(8, 256)])
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
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(moved.decode(dtype=dtype).cpu(), on_cpu.decode(dtype=dtype))
    assert {name: t.nbytes for name, t in on_gpu.tensors().items()} == codec.parts(shape)
