"""Codecs by name, as an allocation and a config.json spell them: "nf3-64-8x256".

nf4, nf4+dq             bitsandbytes' NF4 in blocks of 64, scales in float32 or double-quantized
nf<bits>-<block>-<s>    NormalFloat; s is the scales' dtype, fp32, fp16 or bf16, or their nesting, <bits>x<block>
"""

import re
from functools import cache

import torch

from qsvd.errors import BadInput
from qsvd.numerics.codec import WIDTHS, Codec
from qsvd.numerics.nf4 import NormalFloat4
from qsvd.numerics.normal_float import BLOCK_SIZES, NESTED_BLOCKS, Nesting, NormalFloat

SCALES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FAMILY = re.compile(r"nf(\d+)-(\d+)-(?:(fp32|fp16|bf16)|(\d+)x(\d+))(-fit)?")
ALLOWED = (
    f"nf4 or nf4+dq (bitsandbytes'), or nf<bits>-<block>-<scales> with {', '.join(map(str, WIDTHS))} bits, blocks of "
    f"{', '.join(map(str, BLOCK_SIZES))}, and scales fp32, fp16, bf16 or <bits>x<block> with blocks of "
    f"{', '.join(map(str, NESTED_BLOCKS))}, and -fit after it for fitted scales, such as nf3-64-8x256-fit"
)


@cache
def codec_named(name: str) -> Codec:
    """The codec of this spelling, the same object every time.

    Raises:
        BadInput: there is none; the sentence says what is allowed.
    """
    if name in ("nf4", "nf4+dq"):
        return NormalFloat4(double_quant=name == "nf4+dq")
    found = FAMILY.fullmatch(name)
    if found is None:
        raise BadInput(f"codec {name!r} is none of {ALLOWED}")
    bits, block_size, dtype, scale_bits, scale_block, fit = found.groups()
    try:
        scales = SCALES[dtype] if dtype else Nesting(int(scale_bits), int(scale_block))
        return NormalFloat(bits=int(bits), block_size=int(block_size), scales=scales, fit=bool(fit))
    except ValueError as error:
        raise BadInput(f"codec {name!r}: {error}; a codec is {ALLOWED}") from error


def spelling(codec: Codec) -> str:
    """The name under which `codec_named` finds an equal codec.

    Raises:
        BadInput: it has none, being bitsandbytes' NF4 with blocks of another size than 64.
    """
    if isinstance(codec, NormalFloat4):
        if codec.block_size != 64:
            raise BadInput(f"NF4 in blocks of {codec.block_size} has no name; bitsandbytes' blocks of 64 have one")
        return "nf4+dq" if codec.double_quant else "nf4"
    assert isinstance(codec, NormalFloat), "the two kinds that there are"
    nesting = codec.nesting
    scales = next(name for name, dtype in SCALES.items() if dtype == codec.scale_dtype)
    if nesting is not None:
        scales = f"{nesting.bits}x{nesting.block_size}"
    return f"{codec.name}-{codec.block_size}-{scales}{'-fit' if codec.fit else ''}"
