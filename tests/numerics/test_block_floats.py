"""Every code of FP8 and MXFP4 with every exponent, as transformers and the definition decode it."""

import numpy as np
import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from qsvd.numerics.block_floats import decode_fp8, decode_mxfp4

BYTES = torch.arange(256, dtype=torch.uint8)


def test_every_pair_of_mxfp4_with_every_exponent_is_that_of_transformers():
    blocks, exponents = BYTES.repeat(256).view(256, 16, 16), BYTES[:, None].repeat(1, 16)
    ours, theirs = decode_mxfp4(blocks, exponents), convert_moe_packed_tensors(blocks[None], exponents[None])[0]
    assert ours.shape == theirs.shape == (512, 256)
    assert ours.is_contiguous()
    assert torch.equal(ours[:, :255].view(torch.int16), theirs[:, :255].view(torch.int16))
    assert not ours[:, 255].isfinite().any(), "the exponent 255 is no number"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu])
def test_every_code_of_fp8_is_that_of_transformers_and_of_numpy(dtype):
    codes = BYTES.repeat(256).view(torch.float8_e4m3fn).view(256, 256)
    scales = torch.logspace(-4, 4, 8).view(4, 2).to(dtype)
    ours, theirs = (
        decode_fp8(codes, scales, (64, 128)),
        Fp8Dequantize(None)._dequantize_one(codes, scales, torch.bfloat16),
    )
    assert torch.equal(ours.view(torch.int16), theirs.view(torch.int16))
    wanted = codes.float().numpy().astype(np.float64) * np.kron(scales.float().numpy(), np.ones((64, 128)))
    rounded = torch.from_numpy(wanted.astype(np.float32)).bfloat16()
    assert torch.equal(ours.nan_to_num(), rounded.nan_to_num())
