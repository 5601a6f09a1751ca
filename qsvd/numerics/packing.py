"""Codes of 2, 3, 4 or 8 bits side by side in bytes, the first one in the highest bits: bytes read as one number.

2 bits lie four to a byte, 4 bits two, 8 bits one; 3 bits eight in three bytes, two codes of which cross a byte.

Shape suffixes: N = codes, G = groups that fill whole bytes.
"""

from torch import Tensor
from torch.nn.functional import pad as padded

GROUP_CODES = {2: 4, 3: 8, 4: 2, 8: 1}  # the fewest that fill whole bytes
WIDTHS = tuple(GROUP_CODES)


def packed_bytes(num_codes: int, bits: int) -> int:
    """Bytes that so many codes take."""
    return -(-num_codes * bits // 8)


def pack(codes_N: Tensor, bits: int, *, filler: int = 0) -> Tensor:
    """Codes in bytes, uint8 [ceil(N * bits / 8)].

    Args:
        codes_N: uint8, below 2^bits.
        filler: The code whose bits fill the last byte.
    """
    if bits == 8:
        return codes_N
    count = GROUP_CODES[bits]
    codes_GC = padded(codes_N, (0, -len(codes_N) % count), value=filler).view(-1, count)
    bytes_GB = codes_GC.new_zeros(len(codes_GC), count * bits // 8)
    for code, byte, shift in _overlaps(bits):
        bytes_GB[:, byte] |= codes_GC[:, code] << shift if shift >= 0 else codes_GC[:, code] >> -shift
    return bytes_GB.view(-1)[: packed_bytes(len(codes_N), bits)]


def unpack(packed: Tensor, bits: int, num_codes: int) -> Tensor:
    """The first so many codes of packed bytes, uint8 [num_codes]."""
    if bits == 8:
        return packed[:num_codes]
    count = GROUP_CODES[bits]
    size = count * bits // 8
    bytes_GB = padded(packed, (0, -len(packed) % size)).view(-1, size)
    codes_GC = packed.new_zeros(len(bytes_GB), count)
    for code, byte, shift in _overlaps(bits):
        codes_GC[:, code] |= bytes_GB[:, byte] >> shift if shift >= 0 else bytes_GB[:, byte] << -shift
    return codes_GC.bitwise_and_(2**bits - 1).view(-1)[:num_codes]


def _overlaps(bits: int) -> list[tuple[int, int, int]]:
    """Which code of a group lies in which of its bytes, shifted left by how much, or right where that is negative."""
    count = GROUP_CODES[bits]
    shifts = [
        (code, byte, 8 * (byte + 1) - bits * (code + 1)) for code in range(count) for byte in range(count * bits // 8)
    ]
    return [(code, byte, shift) for code, byte, shift in shifts if -bits < shift < 8]
