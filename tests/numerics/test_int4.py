"""Whole numbers of 4 bits by their definition in NumPy, and by the library compressed-tensors where it is installed."""

import numpy as np
import pytest
import torch

from qsvd.decompose.objective import PLAIN
from qsvd.decompose.rounding import round_nearest, round_with_feedback
from qsvd.errors import BadInput
from qsvd.numerics.int4 import Int4
from qsvd.numerics.names import codec_named, spelling
from tests import reference

SHAPES = {32: (7, 96), 64: (130, 192), 128: (33, 256)}


def matrix(shape, seed=0):
    """Rows that differ in size, and a group of zeros."""
    found = torch.from_numpy(reference.gaussian(*shape, seed=seed)) * torch.logspace(-3, 3, shape[0])[:, None]
    found[1, :32] = 0
    return found


def numbers(packed):
    """The whole numbers [O, I] that are stored, by arithmetic on int32: the first of eight has the lowest bits."""
    words = packed.codes.view(torch.int32).numpy().astype(np.int64).reshape(packed.shape[0], -1) & 0xFFFFFFFF
    return np.stack([words >> 4 * place & 15 for place in range(8)], axis=-1).reshape(packed.shape) - 8


def decoded(packed):
    """Number times scale, float64."""
    scales = packed.scales.double().numpy().reshape(packed.shape[0], -1)
    return numbers(packed) * np.repeat(scales, packed.codec.block_size, axis=1)


def bits(tensor):
    return tensor.view(torch.int16)


@pytest.mark.parametrize("group", SHAPES)
def test_scales_are_the_largest_over_7_5_and_numbers_the_nearest(group):
    weight = matrix(SHAPES[group])
    packed = Int4(group).encode(weight)
    groups = weight.view(-1, group)
    assert torch.equal(packed.scales, (groups.abs().amax(dim=1) / 7.5).bfloat16())
    exact, scales = groups.double().numpy(), packed.scales.double().numpy()[:, None]
    off = np.abs(decoded(packed).reshape(exact.shape) - exact)
    is_cut = np.abs(exact) > 7 * scales
    assert (off <= scales * (0.5 + 1e-6) + is_cut * scales).all()
    assert (numbers(packed)[weight.numpy() == 0] == 0).all()
    assert {-8, 7} <= set(numbers(packed).reshape(-1)), "all of the range is used"


def test_of_two_numbers_that_are_as_near_the_even_one_is_taken():
    weight = torch.zeros(1, 32)
    weight[0, :6] = torch.tensor([7.5, 0.5, 1.5, 2.5, -0.5, -1.5])  # the scale is 1
    assert numbers(Int4(32).encode(weight))[0, :6].tolist() == [7, 0, 2, 2, 0, -2]


@pytest.mark.parametrize("group", SHAPES)
def test_decoding_is_rounded_once_and_bands_decode_to_the_matrix(group, monkeypatch):
    monkeypatch.setattr("qsvd.numerics.int4.RUN", {"cpu": 3 * group})
    packed = Int4(group).encode(matrix(SHAPES[group]))
    exact = torch.from_numpy(decoded(packed))
    assert torch.equal(packed.decode(dtype=torch.float64), exact)
    assert torch.equal(packed.decode(), exact.float()), "eight bits of a scale times four fit into float32"
    assert torch.equal(bits(packed.decode(dtype=torch.bfloat16)), bits(exact.bfloat16()))
    for rows, band in packed.in_rows(4 * packed.shape[1]):
        assert torch.equal(band.decode(), exact[rows].float())
    assert packed.num_bytes == packed.codec.num_bytes(packed.shape) == exact.numel() // 2 + 2 * exact.numel() // group


def test_scales_of_least_error_may_be_negative_and_beat_the_largest_magnitudes():
    weight, codec = matrix((64, 256)), Int4(64)
    weight[3, 64:128] = 0
    nearest = round_nearest(weight, codec)
    wanted = weight.double().numpy()

    def error(packed):
        off = ((decoded(packed) - wanted) ** 2).sum(axis=1)
        return np.sqrt(off / (wanted**2).sum(axis=1)).mean()

    assert 0.2 < (nearest.scales < 0).float().mean() < 0.8
    assert error(nearest) < 0.9 * error(codec.encode(weight))
    scales = np.repeat(nearest.scales.double().numpy().reshape(64, -1), 64, axis=1)
    steps = wanted / np.where(scales == 0, 1, scales)
    assert (np.abs(numbers(nearest) - np.clip(steps, -8, 7)) <= 0.5 + 1e-6).all(), "codes are chosen for stored scales"
    assert (numbers(nearest)[weight.numpy() == 0] == 0).all()


def test_error_feedback_leaves_less_of_what_the_factors_cannot_absorb():
    weight, codec = torch.from_numpy(reference.gaussian(96, 256)), Int4(32)
    down = torch.from_numpy(reference.gaussian(16, 256, seed=1))
    span = np.linalg.qr(down.double().numpy().T)[0]
    rest = np.eye(256) - span @ span.T

    def left(packed):
        return np.linalg.norm((decoded(packed) - weight.double().numpy()) @ rest)

    assert left(round_with_feedback(weight, codec, PLAIN.metric(down, down, 0.01))) < 0.98 * left(
        round_nearest(weight, codec)
    )


def test_names_and_refusals():
    assert [spelling(codec_named(f"int4-{group}")) for group in SHAPES] == ["int4-32", "int4-64", "int4-128"]
    with pytest.raises(BadInput, match="groups have 32, 64 or 128 inputs, not 16"):
        codec_named("int4-16")
    with pytest.raises(BadInput, match="int4-32x"):
        codec_named("int4-32x")
    with pytest.raises(ValueError, match="int4-64 needs columns that divide by 64, and there are 96"):
        Int4(64).encode(torch.ones(4, 96))
    for broken in (torch.nan, torch.inf):
        weight = torch.ones(4, 64)
        weight[2, 60] = broken
        with pytest.raises(ValueError, match="a NaN or an infinity"):
            Int4(64).encode(weight)


@pytest.mark.parametrize("group", SHAPES)
def test_compressed_tensors_quantizes_packs_and_decodes_alike(group):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    weight, codec = matrix(SHAPES[group]), Int4(group)
    kind = quantization.QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=group)
    groups = weight.view(len(weight), -1, group)
    scales, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), kind)
    scales = scales.bfloat16()
    packed = codec.encode(weight)
    words = pack_to_int32(quantize(weight, scales.float(), None, kind, dtype=torch.int8), 4)
    assert torch.equal(words.view(torch.uint8).view(-1), packed.codes)
    is_zero = (groups == 0).all(-1).view(-1)
    assert torch.equal(scales.view(-1)[~is_zero], packed.scales[~is_zero])
    for found in (packed, round_nearest(weight, codec)):
        unpacked = unpack_from_int32(found.codes.view(torch.int32).view(len(weight), -1), 4, weight.shape)
        theirs = dequantize(unpacked, found.scales.view(scales.shape), None, kind)
        assert torch.equal(theirs, found.decode(dtype=torch.bfloat16))
