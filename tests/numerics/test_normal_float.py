"""NormalFloat of 2, 3, 4 and 8 bits against the definition in float64, for every kind of block and scale."""

import itertools
import re
from itertools import pairwise
from math import ceil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qsvd.decompose.alternate import Recipe, split_weight
from qsvd.decompose.split import measure
from qsvd.numerics import codebook, normal_float
from qsvd.numerics.codec import NestedScales, from_bytes
from qsvd.numerics.nf4 import NormalFloat4
from qsvd.numerics.normal_float import Nesting, NormalFloat, rows_of
from tests import normal_floats, reference

UNIT = 2.0**-24  # float32 rounds within this, relatively
LEAST_DIVISOR = 1e-38  # as bitsandbytes: a block whose scale is smaller is not rounded to its nearest levels
BITS = normal_floats.BITS
BLOCKS = (16, 32, 64, 128)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST = {torch.float32: 1e37, torch.bfloat16: 1e37, torch.float16: 65504.0}
NESTED = tuple(Nesting(bits, block) for bits in BITS for block in (16, 64, 256))
SCALES = (torch.float32, torch.float16, torch.bfloat16, *NESTED)
SOME_SCALES = (torch.float32, torch.bfloat16, Nesting(3, 16), Nesting(8, 256))
SHAPES = ((1, 1), (1, 15), (7, 9), (3, 64), (64, 3), (5, 100), (172, 64), (64, 172), (129, 33), (300, 65))
KINDS = ("gaussian", "boundaries", "zero blocks", "zeros", "negative zeros", "denormal", "one large")


def gaussian(*shape, seed=0):
    return torch.from_numpy(reference.gaussian(*shape, seed=seed))


def scales_by_definition(packed):
    """Of each block, float64, from what is stored."""
    nesting = packed.codec.nesting
    blocks = ceil(packed.shape[0] * packed.shape[1] / packed.codec.block_size)
    kind = (nesting.bits, nesting.block_size) if nesting else ()
    return normal_floats.scales_of(packed.tensors(), blocks, *kind)


def indices_of(packed):
    return normal_floats.unpacked_bits(packed.codes.numpy(), packed.codec.bits, packed.shape[0] * packed.shape[1])


def stored_scales(packed):
    """Of each block as qsvd decodes them, float64; judged by assert_scales_by_definition."""
    scales = packed.scales.decode() if isinstance(packed.scales, NestedScales) else packed.scales
    return scales.double().numpy()


def assert_scales_by_definition(packed, matrix):
    """The largest magnitudes, rounded to the dtype of the scales or to the nearest of the even steps."""
    largest = reference.block_scales(matrix.double().numpy(), packed.codec.block_size)
    found, nesting = scales_by_definition(packed), packed.codec.nesting
    if nesting is None:
        assert packed.scales.dtype == packed.codec.scale_dtype
        assert torch.equal(packed.scales, torch.from_numpy(largest).to(packed.codec.scale_dtype))
        return
    assert np.abs(stored_scales(packed) - found).max() <= 4 * UNIT * largest.max()
    absmax = reference.spread(packed.tensors()["absmax"].numpy(), len(largest), nesting.block_size)
    half_step = absmax / (2**nesting.bits - 1) / 2
    assert (np.abs(found - largest) <= half_step + 8 * UNIT * largest.max()).all()
    assert found.min() >= 0
    assert packed.tensors()["offset"] == largest.min()


def assert_nearest(packed, matrix):
    """No other level of any element is nearer, with the scales as they are stored."""
    values = matrix.double().numpy().reshape(-1)
    scales = reference.spread(stored_scales(packed), values.size, packed.codec.block_size)
    distance = np.abs(values[:, None] - normal_floats.levels(packed.codec.bits) * scales[:, None])
    chosen = distance[np.arange(values.size), indices_of(packed)]
    slack = 4 * UNIT * np.maximum(scales, np.abs(values))
    assert (chosen <= distance.min(axis=1) + slack)[scales >= LEAST_DIVISOR].all()


def assert_decodes_by_definition(packed):
    """Exact: a product of two float32 numbers fits in float64, so it is rounded once, as ours is."""
    scales = reference.spread(stored_scales(packed), indices_of(packed).size, packed.codec.block_size)
    expected = normal_floats.levels(packed.codec.bits)[indices_of(packed)] * scales
    expected = torch.from_numpy(expected.astype(np.float32).reshape(packed.shape))
    assert torch.equal(packed.decode(), expected)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(packed.decode(dtype=dtype), expected.to(dtype))
        buffer = torch.full(packed.shape, torch.nan, dtype=dtype)
        assert packed.decode(out=buffer, dtype=torch.float32) is buffer
        assert torch.equal(buffer, expected.to(dtype))


def assert_bytes_as_counted(packed):
    parts = packed.codec.parts(packed.shape)
    assert {name: tensor.nbytes for name, tensor in packed.tensors().items()} == parts
    counted = sum(size for name, size in parts.items() if name != "levels")
    assert packed.num_bytes == packed.codec.num_bytes(packed.shape) == counted


@st.composite
def matrices(draw):
    rows, columns = draw(st.integers(1, 9)), draw(st.sampled_from((1, 2, 3, 8, 15, 16, 31, 64, 65, 100, 172)))
    rng, kind = np.random.default_rng(draw(st.integers(0, 2**32 - 1))), draw(st.sampled_from(KINDS))
    flat = rng.standard_normal(rows * columns) * 10.0 ** draw(st.integers(-30, 30))
    if kind == "boundaries":
        table = normal_floats.levels(draw(st.sampled_from(BITS)))
        flat = rng.choice((table[:-1] + table[1:]) / 2, flat.size) * 2.0 ** rng.integers(-9, 9)
        flat[::16] = 1.0
    elif kind == "zero blocks":
        flat *= np.arange(flat.size) // 16 % 3 == 1
    elif kind == "denormal":
        flat = rng.integers(-40, 40, flat.size) * 10.0 ** -draw(st.integers(36, 44))
    elif kind == "one large":
        flat[rng.integers(flat.size)] *= 1e4
    elif kind in ("zeros", "negative zeros"):
        flat = np.copysign(np.zeros(flat.size), rng.standard_normal(flat.size) if kind == "negative zeros" else 1.0)
    return torch.from_numpy(flat.astype(np.float32).reshape(rows, columns)), draw(st.sampled_from(DTYPES))


@given(matrices(), st.sampled_from(BITS), st.sampled_from(BLOCKS), st.sampled_from(SCALES))
def test_drawn_matrices_are_rounded_to_the_nearest_levels_and_decode_by_definition(drawn, bits, block_size, scales):
    matrix, dtype = drawn
    most = min(LARGEST[dtype], LARGEST.get(scales, 1e37))
    matrix = matrix.clamp(-most, most).to(dtype)
    before = matrix.clone()
    packed = NormalFloat(bits=bits, block_size=block_size, scales=scales).encode(matrix)
    assert packed.shape == tuple(matrix.shape)
    assert_scales_by_definition(packed, matrix)
    assert_nearest(packed, matrix)
    assert_decodes_by_definition(packed)
    assert_bytes_as_counted(packed)
    assert torch.equal(matrix, before)  # nothing was written to


@pytest.mark.parametrize(("scales", "run"), [*zip(SOME_SCALES, (128, 384, 128, 1 << 18), strict=True)], ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_shapes_of_every_kind_in_one_run_and_in_many(bits, scales, run, monkeypatch):
    monkeypatch.setitem(normal_float.RUN, "cpu", run)
    for number, shape in [*enumerate(SHAPES)][SOME_SCALES.index(scales) % 2 :: 2]:
        matrix = gaussian(*shape, seed=run) * torch.linspace(0.1, 3, shape[0])[:, None]
        packed = NormalFloat(bits=bits, block_size=BLOCKS[number % 4], scales=scales).encode(matrix)
        assert_scales_by_definition(packed, matrix)
        assert_decodes_by_definition(packed)
        assert_bytes_as_counted(packed)
        if matrix.numel() < 12_000:
            assert_nearest(packed, matrix)


@pytest.mark.parametrize("bits", BITS)
def test_a_matrix_of_several_real_runs_and_a_short_last_block(bits):
    matrix = gaussian(801, 701)
    assert matrix.numel() > 2 * normal_float.RUN["cpu"]
    assert matrix.numel() % 16 > 0
    packed = NormalFloat(bits=bits, block_size=16, scales=Nesting(4, 64)).encode(matrix)
    assert_scales_by_definition(packed, matrix)
    assert_decodes_by_definition(packed)


@pytest.mark.parametrize("block_size", [32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_four_bits_with_float32_scales_are_the_bytes_of_nf4(block_size, dtype):
    for shape in [(64, 128), (172, 64), (33, 96), (40, 64)]:
        matrix = (gaussian(*shape) * torch.logspace(-3, 3, shape[0])[:, None]).to(dtype)
        matrix[3] = 0
        ours = NormalFloat(bits=4, block_size=block_size).encode(matrix)
        stock = NormalFloat4(double_quant=False, block_size=block_size).encode(matrix)
        assert torch.equal(ours.codes, stock.codes)
        assert torch.equal(ours.scales, stock.scales)
        assert torch.equal(ours.decode(), stock.decode())


@pytest.mark.parametrize("scales", SOME_SCALES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_a_value_on_a_boundary_takes_the_lower_code(bits, scales):
    between = normal_floats.levels(bits).astype(np.float32)
    between = (between[:-1] + between[1:]) / 2
    block = np.ones((len(between), 16), np.float32)
    block[:, 3] = between  # every scale is 1, nested or not
    packed = NormalFloat(bits=bits, block_size=16, scales=scales).encode(torch.from_numpy(block))
    assert indices_of(packed).reshape(-1, 16)[:, 3].tolist() == [*range(len(between))]


@pytest.mark.parametrize("bits", BITS)
def test_bands_of_rows_decode_to_the_matrix(bits):
    for scales in SOME_SCALES:
        for number, shape in enumerate([(70, 172), (172, 70), (33, 64), (3, 5), (1, 1), (64, 1), (129, 96), (5, 200)]):
            codec = NormalFloat(bits=bits, block_size=BLOCKS[number % 4], scales=scales)
            packed = codec.encode(gaussian(*shape))
            for most in (1, 3000, 10**9):
                bands = list(packed.in_rows(most))
                assert [row for rows, _ in bands for row in range(rows.start, rows.stop)] == list(range(shape[0]))
                for dtype in (torch.float32, torch.bfloat16):
                    whole = packed.decode(dtype=dtype)
                    assert torch.equal(torch.cat([band.decode(dtype=dtype) for _, band in bands]), whole)


@pytest.mark.parametrize("bits", BITS)
def test_views_of_bytes_are_the_matrix_again(bits):
    for scales in SCALES:
        for shape in ((37, 53), (1, 1), (64, 128)):
            packed = NormalFloat(bits=bits, block_size=32, scales=scales).encode(gaussian(*shape))
            parts = {name: tensor.reshape(-1).view(torch.uint8) for name, tensor in packed.tensors().items()}
            again = from_bytes(parts, shape, packed.codec, packed.nested_block)
            for found in (again, packed.to(torch.device("cpu")), again.to(torch.device("cpu"))):
                assert torch.equal(found.decode(), packed.decode())
                assert found.num_bytes == packed.num_bytes
                assert found.nested_block == packed.nested_block
                assert {name: part.dtype for name, part in found.tensors().items()} == {
                    name: part.dtype for name, part in packed.tensors().items()
                }


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(1, 1), (5, 13), (64, 172), (130, 128), (1, 16385)])
def test_bytes_are_the_bits_of_codes_and_scales(shape, bits):
    elements = shape[0] * shape[1]
    blocks, codes = ceil(elements / 32), ceil(elements * bits / 8)
    for scales, of_scales in (
        (torch.float32, 4 * blocks),
        (torch.float16, 2 * blocks),
        (torch.bfloat16, 2 * blocks),
        (Nesting(3, 16), ceil(3 * blocks / 8) + 4 * ceil(blocks / 16) + 4),
        (Nesting(8, 256), blocks + 4 * ceil(blocks / 256) + 4),
    ):
        assert NormalFloat(bits=bits, block_size=32, scales=scales).num_bytes(shape) == codes + of_scales


@pytest.mark.parametrize("block_size", [16, 64])
def test_the_error_of_gaussian_noise_is_what_the_levels_predict_and_falls_with_the_bits(block_size):
    matrix = gaussian(1024, 512, seed=block_size)
    found = []
    for bits in BITS:
        error = NormalFloat(bits=bits, block_size=block_size).encode(matrix).decode() - matrix
        squares = error.double().square().view(-1, block_size).mean(dim=1)  # of each block, independent of the others
        deviation = float(squares.std()) / len(squares) ** 0.5
        assert deviation < 0.02 * squares.mean()
        assert float(squares.mean()) == pytest.approx(
            normal_floats.gaussian_error(bits, block_size) ** 2, abs=5 * deviation
        )
        found.append(float(squares.mean()) ** 0.5)
    assert all(earlier > 1.5 * later for earlier, later in pairwise(found))


@pytest.mark.parametrize("bits", [3, 4, 8])  # with 2, largest magnitudes are far from the best scales: noise helps
def test_nested_scales_cost_the_less_the_more_bits_they_have(bits):
    matrix = gaussian(512, 512)

    def error(scales):
        return float((NormalFloat(bits=bits, scales=scales).encode(matrix).decode() - matrix).norm())

    nested = [error(Nesting(scale_bits, 16)) for scale_bits in BITS]
    assert nested == sorted(nested, reverse=True)
    assert nested[-1] < 1.002 * error(torch.float32)


def test_codes_are_chosen_for_the_scales_as_they_are_stored():
    """Nearer than the codes of the exact scales, decoded with the nested ones."""
    matrix = gaussian(256, 256) * torch.logspace(-1, 0, 256)[:, None]
    nested = NormalFloat(bits=4, scales=Nesting(2, 64)).encode(matrix)
    exact = NormalFloat(bits=4).encode(matrix)
    mixed = type(nested)(exact.codes, nested.scales, nested.shape, nested.codec)
    assert (nested.decode() - matrix).norm() < 0.95 * (mixed.decode() - matrix).norm()


@pytest.mark.parametrize("scales", SCALES, ids=str)
def test_a_matrix_of_zeros_and_one_without_elements(scales):
    codec = NormalFloat(bits=3, block_size=16, scales=scales)
    assert torch.equal(codec.encode(torch.zeros(7, 9)).decode(), torch.zeros(7, 9))
    for shape in ((0, 5), (5, 0)):
        packed = codec.encode(torch.zeros(shape))
        assert packed.decode().shape == shape
        assert_bytes_as_counted(packed)


@pytest.mark.parametrize("scales", [torch.float16, Nesting(2, 16)], ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_a_block_whose_scale_rounds_to_zero_holds_the_code_of_zero(bits, scales):
    matrix = torch.full((2, 64), 1e-9)
    matrix[1] = 0  # the smallest scale, so that the others are even steps from it
    matrix[0, 0] = 1
    packed = NormalFloat(bits=bits, block_size=32, scales=scales).encode(matrix)
    assert set(indices_of(packed)[32:]) == {2 ** (bits - 1) - 1}
    assert not packed.decode()[0, 32:].any()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_code_of_zero_fills_the_last_byte(bits):
    for columns in range(1, 9):
        packed = NormalFloat(bits=bits).encode(torch.ones(1, columns))
        codes = np.append(np.full(columns, 2**bits - 1, np.uint8), np.full(8, 2 ** (bits - 1) - 1, np.uint8))
        assert np.array_equal(packed.codes.numpy(), normal_floats.packed_bits(codes, bits)[: len(packed.codes)])


def test_a_non_contiguous_matrix_encodes_like_its_copy():
    wide = gaussian(90, 140)
    for view in (wide.mT, wide[::2, 1::3], wide[:, 5:70]):
        assert not view.is_contiguous()
        ours, copied = (NormalFloat(bits=3).encode(one) for one in (view, view.contiguous()))
        assert torch.equal(ours.codes, copied.codes)
        assert torch.equal(ours.decode(), copied.decode())


@pytest.mark.parametrize("scales", SOME_SCALES, ids=str)
def test_split_weight_and_measure_take_it_and_report_its_bits(scales):
    weight = torch.from_numpy(reference.decaying(96, 130, power=0.4))
    errors = []
    for rank in (0, 16):
        split = split_weight(weight, Recipe(NormalFloat(bits=3, block_size=32, scales=scales), rank=rank))
        left = weight.double() - split.residual.decode().double() - split.up_OR.double() @ split.down_RI.double()
        found = measure(weight, split, name="w", role="q")
        assert found.after.frobenius == pytest.approx(left.norm().item(), rel=1e-5)
        stored = sum(t.nbytes for name, t in split.residual.tensors().items() if name != "levels")
        assert found.bits == 8 * (stored + 2 * rank * (96 + 130)) / weight.numel()
        errors.append(found.after.frobenius)
    assert errors[1] < 0.8 * errors[0]
    assert errors[0] == found.before.frobenius


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_or_infinity_anywhere_is_refused(dtype):
    for bad, place in itertools.product([torch.nan, torch.inf, -torch.inf], [0, 63, 70, 149]):
        matrix = gaussian(3, 50).to(dtype)
        matrix.view(-1)[place] = bad
        for scales in SOME_SCALES:
            with pytest.raises(ValueError, match=r"nf3-16-.* cannot encode a matrix that holds a NaN or an infinity"):
                NormalFloat(bits=3, block_size=16, scales=scales).encode(matrix)


@pytest.mark.parametrize(
    "matrix",
    [torch.zeros(64), torch.zeros(2, 3, 64), torch.zeros(2, 64).double(), torch.zeros(2, 64, dtype=torch.uint8)],
)
def test_what_is_no_16_or_32_bit_matrix_is_refused(matrix):
    said = f"nf2-64-fp32 encodes a float32, bfloat16 or float16 matrix, not {matrix.dtype} ({matrix.shape[0]},"
    with pytest.raises(ValueError, match=re.escape(said)):
        NormalFloat(bits=2).encode(matrix)


@pytest.mark.parametrize(("dtype", "value", "most"), [(torch.float16, 7e4, "6.55e"), (torch.bfloat16, 3.4e38, "3.39e")])
def test_scales_too_large_for_16_bits_are_refused(dtype, value, most):
    matrix = torch.full((2, 64), value)
    with pytest.raises(ValueError, match=rf"a scale of {re.escape(f'{value:.4g}')} is above {most}.*float32 scales"):
        NormalFloat(bits=2, scales=dtype).encode(matrix)
    assert NormalFloat(bits=2).encode(matrix).decode()[0, 0] == matrix[0, 0]


@pytest.mark.parametrize("bits", [0, 1, 5, 16, -2])
def test_bits_that_no_codec_has_are_refused(bits):
    with pytest.raises(ValueError, match=f"codes have 2, 3, 4 or 8 bits, not {bits}"):
        NormalFloat(bits=bits)
    with pytest.raises(ValueError, match=f"scales have 2, 3, 4 or 8 bits, not {bits}"):
        Nesting(bits=bits)


@pytest.mark.parametrize("size", [0, 8, 48, 512, -64])
def test_block_sizes_that_no_codec_has_are_refused(size):
    with pytest.raises(ValueError, match=f"blocks have 16, 32, 64 or 128 elements, not {size}"):
        NormalFloat(bits=3, block_size=size)
    with pytest.raises(ValueError, match=f"blocks of scales have 16, 64 or 256 scales, not {size}"):
        Nesting(block_size=size)


@pytest.mark.parametrize("scales", [torch.float64, torch.uint8, "float32", 8])
def test_scales_of_another_kind_are_refused(scales):
    with pytest.raises(ValueError, match=f"scales are float32, float16, bfloat16 or a Nesting, not {scales}"):
        NormalFloat(bits=3, scales=scales)


@pytest.mark.parametrize("shape", [*SHAPES, (40, 96), (9, 128)])
@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16, Nesting(8, 256), Nesting(8, 16)])
def test_rows_are_those_of_the_matrix(shape, scales):
    packed = NormalFloat(bits=8, scales=scales).encode(gaussian(*shape, seed=7))
    rows = torch.randint(shape[0], (11,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(rows_of(packed, rows), packed.decode()[rows])
    assert rows_of(packed, rows[:0]).shape == (0, shape[1])
    for outside in (-1, shape[0]):
        with pytest.raises((IndexError, RuntimeError), match=r"out of range|out of bounds"):
            rows_of(packed, torch.tensor([outside]))


@pytest.mark.parametrize("count", [10, 2_000, 20_000])  # searched, compared together, compared one after another
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_value_between_two_levels_takes_the_lower_code_in_any_company(bits, count):
    levels_L = codebook.levels(bits).numpy()
    between_L = (levels_L[:-1] + levels_L[1:]) / 2
    for step in (-1, 0, 1):
        values_L = np.nextafter(between_L, np.float32(step)) if step else between_L
        found_N = codebook.nearest(torch.from_numpy(np.resize(values_L, count)), bits)
        above_L = (values_L > between_L).astype(np.uint8)
        assert found_N.tolist() == np.resize(np.arange(len(between_L)) + above_L, count).tolist()
