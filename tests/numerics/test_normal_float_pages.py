"""Residuals of any bits in a linear layer, resident and in pages."""

import pytest
import torch

from qsvd.adapters.adapter import Adapter
from qsvd.adapters.linear import SplitLinear
from qsvd.adapters.pages.buffers import DiskStore
from qsvd.adapters.pages.cache import PageCache, PagedResidual
from qsvd.files.readers import PageReader
from qsvd.memory.items import padded
from qsvd.numerics.normal_float import Nesting, NormalFloat
from tests import reference
from tests.adapters.principals import Given, dense_output

CPU = torch.device("cpu")
SHAPES = ((37, 53), (64, 128), (1, 1), (5, 13))
CODECS = [
    NormalFloat(bits=bits, block_size=block_size, scales=scales)
    for bits, block_size in ((2, 16), (3, 32), (4, 64), (8, 128))
    for scales in (torch.float32, torch.float16, torch.bfloat16, Nesting(3, 16), Nesting(8, 256))
]


def packed_residuals(codec):
    return [codec.encode(torch.from_numpy(reference.gaussian(*shape, seed=seed))) for seed, shape in enumerate(SHAPES)]


def paged_residuals(packed):
    """Every one in a page of its own, behind the bytes of another tensor."""
    pages, places = [], []
    for one in packed:
        start, page, place = padded(1), {0: b"x"}, {}
        for name, size in one.codec.parts(one.shape).items():
            content = one.tensors()[name].reshape(-1).view(torch.uint8).numpy().tobytes()
            assert len(content) == size
            page[start], place[name] = content, (start, size)
            start += padded(size)
        pages.append((page, start))
        places.append(place)
    cache = PageCache(DiskStore(PageReader([page for page, _ in pages]), [size for _, size in pages]), CPU)
    return [
        PagedResidual(cache, number, place, one.shape, one.codec, one.nested_block)
        for number, (place, one) in enumerate(zip(places, packed, strict=True))
    ]


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: f"{codec.name}-{codec.nesting or codec.scale_dtype}")
def test_a_residual_in_a_page_is_the_residual(codec):
    packed = packed_residuals(codec)
    paged = paged_residuals(packed)
    for number in (0, 1, 2, 3, 2, 0, 3, 1):
        found = paged[number].read(backward_follows=False)
        assert torch.equal(found.decode(), packed[number].decode())
        assert found.num_bytes == packed[number].num_bytes


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: f"{codec.name}-{codec.nesting or codec.scale_dtype}")
def test_a_linear_layer_computes_with_it_resident_or_paged(codec):
    packed = packed_residuals(codec)[0]
    rows, columns = packed.shape
    inputs = torch.from_numpy(reference.gaussian(6, columns, seed=9))
    found = []
    for residual in (packed, paged_residuals([packed])[0]):
        adapter: Adapter = Given((rows, columns), 4, has_gain=False)
        x = inputs.clone().requires_grad_()
        linear = SplitLinear(residual, adapter, None).to(torch.bfloat16).float()  # its bytes stay what they are
        y = linear(x)
        y.square().sum().backward()
        found.append((y.detach(), x.grad, adapter.up.grad))
        dense = dense_output(inputs.double(), packed.decode().double(), adapter.up.double(), adapter.down.double())
        assert torch.allclose(y.double(), dense, rtol=0, atol=1e-5 * float(dense.abs().max().detach()))
    assert all(map(torch.equal, *found))
