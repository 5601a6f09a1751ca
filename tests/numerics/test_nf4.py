"""NF4 against the real bitsandbytes, to the bit, and against the definition in float64."""

import itertools
from math import ceil

import bitsandbytes.functional as bitsandbytes
import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from qsvd.numerics import codebook, nf4
from qsvd.numerics.codec import NestedScales
from qsvd.numerics.nf4 import NormalFloat4
from tests import reference

UNIT = 2.0**-24  # float32 rounds within this, relatively
LARGEST_HALF = 65504.0
LEAST_DIVISOR = 1e-38  # bitsandbytes divides by no less, so a block of denormals is not rounded to its nearest levels
CELL = 2 / 65536  # bitsandbytes' CPU finds an 8-bit level through a table of 65,536 cells over -1..1
KINDS = ("gaussian", "boundaries", "zero blocks", "zeros", "denormal", "negative zeros")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 1), (1, 63), (7, 9), (3, 64), (64, 3), (5, 100), (172, 64), (64, 172), (128, 33), (300, 65))
BOUNDARIES32 = (reference.NF4_LEVELS.astype(np.float32)[:-1] + reference.NF4_LEVELS.astype(np.float32)[1:]) / 2


def bits(tensor):
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.uint8)


def assert_same_bytes_as_bitsandbytes(matrix, *, double_quant, block_size=64):
    packed = NormalFloat4(double_quant=double_quant, block_size=block_size).encode(matrix)
    codes, state = bitsandbytes.quantize_4bit(
        matrix, blocksize=block_size, compress_statistics=double_quant, quant_type="nf4"
    )
    assert packed.shape == tuple(matrix.shape)
    assert torch.equal(packed.codes, codes.view(-1))
    assert torch.equal(bits(codebook.levels(4)), bits(state.code))
    assert isinstance(packed.scales, NestedScales) == double_quant
    if isinstance(packed.scales, NestedScales):
        ours, stock = packed.scales, state.state2
        pairs = ((ours.codes, state.absmax), (ours.absmax, stock.absmax), (ours.levels, stock.code))
        assert all(torch.equal(bits(left), bits(right)) for left, right in pairs)
        assert torch.equal(bits(ours.offset), bits(state.offset))
        assert ours.block_size == stock.blocksize
    else:
        assert torch.equal(bits(packed.scales), bits(state.absmax))


def assert_decodes_by_definition(packed, matrix):
    """Exact: a product of two float32 numbers fits in float64, so it is rounded once, as ours is."""
    scales = packed.scales.decode() if isinstance(packed.scales, NestedScales) else packed.scales
    indices = reference.unpacked(packed.codes.numpy(), matrix.numel())
    expected = reference.nf4_decode(indices, scales.numpy(), packed.shape, packed.codec.block_size)
    assert np.array_equal(packed.decode().numpy(), expected.astype(np.float32))
    if not isinstance(packed.scales, NestedScales):
        per_element = reference.spread(scales.numpy(), matrix.numel(), packed.codec.block_size)
        miss = np.abs(expected.reshape(-1) - matrix.double().numpy().reshape(-1))
        assert (miss <= (reference.HALF_GAP + 8 * UNIT) * per_element)[per_element >= LEAST_DIVISOR].all()


@st.composite
def matrices(draw):
    rows, columns = draw(st.integers(1, 9)), draw(st.sampled_from((1, 2, 3, 31, 63, 64, 65, 100, 128, 172, 333)))
    rng, kind = np.random.default_rng(draw(st.integers(0, 2**32 - 1))), draw(st.sampled_from(KINDS))
    flat = rng.standard_normal(rows * columns) * 10.0 ** draw(st.integers(-30, 30))
    if kind == "boundaries":
        near = np.stack((BOUNDARIES32, np.nextafter(BOUNDARIES32, np.float32(2)), np.nextafter(BOUNDARIES32, -2)))
        flat = rng.choice(near.reshape(-1).astype(np.float64), flat.size) * 2.0 ** rng.integers(-9, 9)
        flat[::40] = flat[::40] / np.abs(flat[::40]) * np.abs(flat).max() * rng.choice((1.0, 1.5))
    elif kind == "zero blocks":
        flat *= np.arange(flat.size) // 64 % 2
    elif kind == "denormal":
        flat = rng.integers(-40, 40, flat.size) * 10.0 ** -draw(st.integers(36, 44))
    elif kind in ("zeros", "negative zeros"):
        flat = np.copysign(np.zeros(flat.size), rng.standard_normal(flat.size) if kind == "negative zeros" else 1.0)
    matrix = torch.from_numpy(flat.astype(np.float32).reshape(rows, columns))
    dtype = draw(st.sampled_from(DTYPES))
    return matrix.clamp(-LARGEST_HALF, LARGEST_HALF).half() if dtype == torch.float16 else matrix.to(dtype)


@given(matrices(), st.booleans(), st.sampled_from((32, 64, 64, 128, 4096)))
def test_drawn_matrices_encode_to_bitsandbytes_bytes_and_decode_by_definition(matrix, double_quant, block_size):
    assert_same_bytes_as_bitsandbytes(matrix, double_quant=double_quant, block_size=block_size)
    codec = NormalFloat4(double_quant=double_quant, block_size=block_size)
    packed = codec.encode(matrix)
    assert_decodes_by_definition(packed, matrix)
    assert packed.num_bytes == codec.num_bytes(packed.shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_every_kind_in_one_run_and_in_many(shape, monkeypatch):
    for run, double_quant in itertools.product([64, 192, 1 << 19], [False, True]):
        monkeypatch.setattr(nf4, "RUN", run)
        matrix = torch.from_numpy(reference.gaussian(*shape, seed=run))
        assert_same_bytes_as_bitsandbytes(matrix, double_quant=double_quant)
        assert_decodes_by_definition(NormalFloat4(double_quant=double_quant).encode(matrix), matrix)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_matrix_of_several_real_runs_and_a_short_last_block(dtype):
    matrix = torch.from_numpy(reference.gaussian(1500, 701)).to(dtype)
    assert matrix.numel() > 2 * nf4.RUN
    assert matrix.numel() % 64 > 0
    assert_same_bytes_as_bitsandbytes(matrix, double_quant=True)
    assert_decodes_by_definition(NormalFloat4(double_quant=True).encode(matrix), matrix)


@pytest.mark.parametrize("shape", [(256, 688), (128, 80), (9, 2000), (5, 16)])
def test_decode_is_right_where_rows_of_whole_16s_do_not_hold_whole_blocks(shape):
    """There bitsandbytes' own decode misplaces the scales on AVX-512 machines."""
    matrix = torch.from_numpy(reference.gaussian(*shape) * np.linspace(0.1, 3, shape[0], dtype=np.float32)[:, None])
    packed = NormalFloat4(double_quant=False).encode(matrix)
    assert_decodes_by_definition(packed, matrix)
    by_definition = reference.nf4_round_trip(matrix.numpy(), double_quant=False)
    close = np.abs(packed.decode().numpy() - by_definition) <= 2 * UNIT * np.abs(by_definition)
    assert (~close).sum() <= 2  # ties: a scaled value within a few UNIT of a boundary, about 1e-6 of all


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(64, 128), (3, 64), (40, 192), (1, 6400)])
def test_bitsandbytes_decodes_what_we_packed(shape, double_quant, dtype):
    matrix = torch.from_numpy(reference.gaussian(*shape)).to(dtype)
    packed = NormalFloat4(double_quant=double_quant).encode(matrix)
    scales, offset, nested = packed.scales, None, None
    if isinstance(scales, NestedScales):
        nested = bitsandbytes.QuantState(
            absmax=scales.absmax, code=scales.levels, blocksize=scales.block_size, dtype=torch.float32
        )
        scales, offset = scales.codes, scales.offset
    state = bitsandbytes.QuantState(
        absmax=scales, shape=matrix.shape, dtype=torch.float32, blocksize=64, code=codebook.levels(4),
        quant_type="nf4", offset=offset, state2=nested,
    )  # fmt: skip
    assert torch.equal(bitsandbytes.dequantize_4bit(packed.codes.view(-1, 1), state), packed.decode())


def test_a_value_on_a_boundary_takes_the_lower_level_and_its_neighbours_the_nearest():
    for offset, neighbours in enumerate((BOUNDARIES32, np.nextafter(BOUNDARIES32, np.float32(2)))):
        block = torch.ones(1, 64)
        block[0, :15] = torch.from_numpy(neighbours)
        indices = reference.unpacked(NormalFloat4(double_quant=False).encode(block).codes.numpy(), 15)
        assert indices.tolist() == [index + offset for index in range(15)]
    below = torch.ones(1, 64)
    below[0, :15] = torch.from_numpy(np.nextafter(BOUNDARIES32, np.float32(-2)))
    assert reference.unpacked(NormalFloat4(double_quant=False).encode(below).codes.numpy(), 15).tolist() == [*range(15)]


@pytest.mark.parametrize("size", [46, 64])
def test_scaled_values_beside_a_boundary_round_as_bitsandbytes_rounds_them(size):
    """Whole blocks are multiplied by a reciprocal, a short one is divided: the last bit decides."""
    for scale in np.random.default_rng(0).uniform(1, 2, 100).astype(np.float32):
        on = BOUNDARIES32 * scale
        block = np.concatenate((on, np.nextafter(on, np.float32(4)), np.nextafter(on, np.float32(-4)), [scale] * 19))
        matrix = torch.from_numpy(block[:size].astype(np.float32)[None])
        assert_same_bytes_as_bitsandbytes(matrix, double_quant=False)


def test_every_float32_near_a_boundary_takes_the_nearest_level():
    """Dense sweeps across the half-precision numbers around each boundary, where the table gives way to comparison."""
    sweeps = [np.linspace(b - abs(b) / 400, b + abs(b) / 400, 4096, dtype=np.float32) for b in BOUNDARIES32]
    matrix = np.stack(sweeps).reshape(-1, 32)
    matrix = np.concatenate((matrix, np.ones_like(matrix)), axis=1)  # each block's scale is 1
    packed = NormalFloat4(double_quant=False).encode(torch.from_numpy(matrix))
    expected = np.searchsorted(BOUNDARIES32, matrix.reshape(-1), side="left")
    assert np.array_equal(reference.unpacked(packed.codes.numpy(), matrix.size), expected)


def test_the_levels_are_quantiles_of_the_normal_distribution():
    """QLoRA, appendix E: half as many quantiles on each side, an exact zero, the largest scaled to 1."""
    above = scipy.stats.norm.ppf(np.linspace(0.9677083, 0.5, 9)[:-1])
    below = -scipy.stats.norm.ppf(np.linspace(0.9677083, 0.5, 8)[:-1])
    quantiles = np.sort(np.concatenate((below, [0.0], above))) / above.max()
    assert codebook.levels(4).numpy() == pytest.approx(quantiles, abs=4 * UNIT)
    assert np.array_equal(codebook.levels(4).double().numpy(), reference.NF4_LEVELS)


@pytest.mark.parametrize("shape", [(3, 100), (300, 65), (600, 64)])
def test_double_quantized_scales_are_rounded_to_the_nearest_of_the_dynamic_map(shape):
    matrix = reference.gaussian(*shape) * np.linspace(0.5, 2, shape[0], dtype=np.float32)[:, None]
    decoded = NormalFloat4(double_quant=True).encode(torch.from_numpy(matrix)).scales.decode().numpy()
    scales = reference.block_scales(matrix, 64)
    nearest = np.abs(reference.nest(scales) - scales)
    slack = CELL * np.abs(scales - scales.mean()).max() + 8 * UNIT * scales.max()
    assert (np.abs(decoded - scales) <= nearest + slack).all()


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_non_contiguous_matrix_encodes_like_its_copy(double_quant):
    wide = torch.from_numpy(reference.gaussian(90, 140))
    before = wide.clone()
    for view in (wide.mT, wide[::2, 1::3], wide[:, 5:70]):
        assert not view.is_contiguous()
        assert_same_bytes_as_bitsandbytes(view.contiguous(), double_quant=double_quant)
        ours, copied = (NormalFloat4(double_quant=double_quant).encode(m) for m in (view, view.contiguous()))
        assert torch.equal(ours.codes, copied.codes)
        assert torch.equal(ours.decode(), copied.decode())
    assert torch.equal(wide, before)  # and neither was written to


@pytest.mark.parametrize("shape", [(7, 100), (4, 64), (1, 1), (3, 5)])
def test_decode_fills_the_buffer_it_is_given(shape):
    packed = NormalFloat4(double_quant=True).encode(torch.from_numpy(reference.gaussian(*shape)))
    buffer = torch.full(shape, torch.nan)
    assert packed.decode(out=buffer) is buffer
    assert torch.equal(buffer, packed.decode())


@pytest.mark.parametrize("shape", [(1, 1), (5, 13), (64, 172), (130, 128), (1, 16385)])
def test_bytes_are_half_a_byte_an_element_and_four_or_about_one_a_block(shape):
    elements = shape[0] * shape[1]
    blocks = ceil(elements / 64)
    plain, double = NormalFloat4(double_quant=False), NormalFloat4(double_quant=True)
    assert plain.num_bytes(shape) == (elements + 1) // 2 + 4 * blocks
    assert double.num_bytes(shape) == (elements + 1) // 2 + blocks + 4 * ceil(blocks / 256) + 4
    matrix = torch.from_numpy(reference.gaussian(*shape))
    assert all(codec.encode(matrix).num_bytes == codec.num_bytes(shape) for codec in (plain, double))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_or_infinity_anywhere_is_refused(dtype):
    for bad, place in itertools.product([torch.nan, torch.inf, -torch.inf], [0, 63, 70, 149]):
        matrix = torch.from_numpy(reference.gaussian(3, 50)).to(dtype)
        matrix.view(-1)[place] = bad
        with pytest.raises(ValueError, match="cannot encode a matrix that holds a NaN or an infinity"):
            NormalFloat4(double_quant=True).encode(matrix)


@pytest.mark.parametrize(
    "matrix",
    [torch.zeros(64), torch.zeros(2, 3, 64), torch.zeros(2, 64).double(), torch.zeros(2, 64, dtype=torch.uint8)],
)
def test_what_is_no_16_or_32_bit_matrix_is_refused(matrix):
    said = rf"not {matrix.dtype} \({matrix.shape[0]},".replace(".", r"\.")
    with pytest.raises(ValueError, match=said):
        NormalFloat4(double_quant=False).encode(matrix)


@pytest.mark.parametrize("block_size", [0, 16, 48, 8192, -64])
def test_a_block_size_that_bitsandbytes_lacks_is_refused(block_size):
    with pytest.raises(ValueError, match=f"block size {block_size} is not one of bitsandbytes'"):
        NormalFloat4(double_quant=False, block_size=block_size)


DECODED_SHAPES = ((1, 1), (1, 63), (3, 64), (7, 9), (70, 172), (172, 64), (300, 65), (5, 13), (128, 33))
HALVES = (torch.bfloat16, torch.float16)


def packed_matrix(shape, *, double_quant):
    """Of numbers from some that float16 holds as denormals to some near its largest."""
    matrix = torch.from_numpy(reference.gaussian(*shape)) * torch.logspace(-7, 4, shape[0])[:, None]
    return NormalFloat4(double_quant=double_quant).encode(matrix)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", DECODED_SHAPES)
def test_decode_rounds_once_from_float32(shape, dtype, monkeypatch):
    for run, double_quant in itertools.product([64, 192, 1 << 19], [False, True]):
        monkeypatch.setattr(nf4, "RUN", run)
        packed = packed_matrix(shape, double_quant=double_quant)
        decoded = packed.decode(dtype=dtype)
        assert (decoded.dtype, tuple(decoded.shape)) == (dtype, shape)
        assert torch.equal(decoded, packed.decode().to(dtype))
        assert packed.decode().dtype == torch.float32


@pytest.mark.parametrize("dtype", HALVES)
def test_several_real_runs_and_a_short_last_block_are_rounded_once(dtype):
    packed = packed_matrix((1500, 701), double_quant=True)
    assert torch.equal(packed.decode(dtype=dtype), packed.decode().to(dtype))


@pytest.mark.parametrize("shape", DECODED_SHAPES)
def test_float64_holds_the_float32_numbers(shape):
    packed = packed_matrix(shape, double_quant=True)
    assert torch.equal(packed.decode(dtype=torch.float64), packed.decode().double())


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_the_dtype_of_a_buffer_is_used_and_not_the_one_asked_for(dtype):
    packed = packed_matrix((7, 100), double_quant=False)
    buffer = torch.full((7, 100), torch.nan, dtype=dtype)
    assert packed.decode(out=buffer, dtype=torch.float64) is buffer
    assert torch.equal(buffer, packed.decode().to(dtype))


@pytest.mark.parametrize("dtype", HALVES)
def test_decoding_writes_to_nothing_else(dtype):
    packed = packed_matrix((70, 172), double_quant=False)
    before = packed.codes.clone(), packed.scales.clone()
    packed.decode(dtype=dtype)
    assert torch.equal(packed.codes, before[0])
    assert torch.equal(packed.scales, before[1])
