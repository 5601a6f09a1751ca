"""Numbers of 8 and 4 bits with a scale for each block, as models are published in, decoded to bfloat16.

Shape suffixes: O = out features, I = in features, G = groups of 32 in features.
"""

import torch
from torch import Tensor

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # E2M1: the value of a code without its sign, the highest bit
MX_GROUP = 32  # numbers of MXFP4 that share an exponent (OCP Microscaling Formats 1.0, section 5.2)
EXPONENT_BIAS = 127  # of E8M0


def decode_fp8(codes_OI: Tensor, scales: Tensor, block: tuple[int, int], first_row: int = 0) -> Tensor:
    """Multiply every block of FP8 numbers by its scale.

    Args:
        codes_OI: float8 [O, I].
        scales: Any float dtype [blocks down, blocks across], from the block of the first row on. The last blocks may
            be cut by the end of the matrix.
        block: Rows and columns that share a scale.
        first_row: Of `codes_OI` in its block, where it is a part of a matrix.

    Returns:
        bfloat16 [O, I]; the product is rounded once, from float32.
    """
    height, width = block
    rows, columns = codes_OI.shape
    decoded_OI = torch.empty(rows, columns, dtype=torch.bfloat16)
    for number, across in enumerate(scales.float()):
        begin, end = max(number * height - first_row, 0), min((number + 1) * height - first_row, rows)
        scales_I = across.repeat_interleave(width)[:columns]
        decoded_OI[begin:end] = codes_OI[begin:end].float() * scales_I
    return decoded_OI


def decode_mxfp4(blocks: Tensor, exponents_OG: Tensor) -> Tensor:
    """Decode a matrix of MXFP4, exactly but for values outside the range of bfloat16; those are infinite.

    Args:
        blocks: uint8 [O, G, 16]; the low half of a byte is the first of its two numbers.
        exponents_OG: uint8 [O, G]: 127 is a factor of 1; 255 is no number.

    Returns:
        bfloat16 [I, O], transposed, as gpt-oss multiplies with it.
    """
    values = torch.tensor([*FP4, *(-value for value in FP4)])
    pairs = torch.cartesian_prod(values, values).flip(1)  # [256, 2]: of the byte 16 * high + low, first low
    pair_of_byte = pairs.to(torch.bfloat16).view(torch.int32).flatten()  # two numbers in 32 bits, to look up once
    numbers = pair_of_byte.index_select(0, blocks.flatten().int()).view(torch.bfloat16)
    powers_OG = torch.pow(2.0, exponents_OG.int() - EXPONENT_BIAS).to(torch.bfloat16)
    decoded_OI = numbers.view(*exponents_OG.shape, MX_GROUP).mul_(powers_OG[..., None]).flatten(1)
    return decoded_OI.T.contiguous()
