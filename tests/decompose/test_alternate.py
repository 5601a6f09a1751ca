"""The loop against the papers' loops in NumPy float64, and against a scripted quantizer whose error is known."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qsvd.decompose import objective
from qsvd.decompose.alternate import Recipe, split_weight
from qsvd.numerics.codec import Codec, NestedScales, PackedBlocks
from qsvd.numerics.nf4 import NormalFloat4
from tests import reference

UNIT = 2.0**-24  # float32 rounds within this, relatively
ROUNDOFF = 40 * UNIT  # of ||W||_F: float32 sums of a few dozen products
CLEAR = 5e-6  # of a block's scale: ten times what float32 moves a value of these small matrices
# How far the mean of six sketched runs ends above the run with full SVDs, relative: mean + 7 deviations, over 15 seeds.
# LoftQ's order makes its first sketch of a flat spectrum.
SHORT = {"svd": 2.7e-3, "quantize": 7.9e-3}
NF4 = NormalFloat4(double_quant=False)


class Scripted(Codec):
    """Gives back each matrix off by the next number of a script, spread evenly over the matrix."""

    name = "scripted"

    def __init__(self, script):
        self.script, self.made = script, []

    def encode(self, matrix_OI):
        off = self.script[len(self.made)] / matrix_OI.numel() ** 0.5
        self.made.append(matrix_OI + off * torch.where(torch.arange(matrix_OI.shape[1]) % 2 == 0, 1.0, -1.0))
        codes = torch.tensor([len(self.made) - 1], dtype=torch.uint8)
        return PackedBlocks(codes, torch.zeros(0), tuple(matrix_OI.shape), self)

    def decode(self, packed, dtype):
        return self.made[int(packed.codes)].to(dtype, copy=True)

    def decode_into(self, packed, out_OI):
        out_OI.copy_(self.made[int(packed.codes)])

    def parts(self, shape):
        return {"codes": 1 + 0 * shape[0]}


def weight_of(shape, seed=0, power=0.4):
    """Principal components plus noise, and entries of about 1."""
    matrix = reference.decaying(*shape, power=power, seed=seed)
    return matrix * np.float32((shape[0] * shape[1]) ** 0.5 / np.linalg.norm(matrix))


def roundoff_of(weight):
    return ROUNDOFF * float(np.linalg.norm(weight))


def distance(weight, split):
    """||W - Q - B A||_F of what is stored, in float64: codes and scales decoded by definition."""
    scales = split.residual.scales
    scales = scales.decode() if isinstance(scales, NestedScales) else scales
    indices = reference.unpacked(split.residual.codes.numpy(), weight.size)
    residual = reference.nf4_decode(indices, scales.numpy(), weight.shape)
    return np.linalg.norm(weight - residual - split.up_OR.double().numpy() @ split.down_RI.double().numpy())


def same_bytes(left, right):
    return (
        torch.equal(left.residual.codes, right.residual.codes)
        and torch.equal(left.residual.decode(), right.residual.decode())
        and torch.equal(left.up_OR, right.up_OR)
        and torch.equal(left.down_RI, right.down_RI)
        and left.history == right.history
    )


def clear_weight(shape, *, order, end):
    """The first weight whose values stay clear of the boundaries between levels, so that every codec agrees."""
    for seed in range(60):
        weight = weight_of(shape, seed)
        passes = reference.alternation(weight, rank=3, passes=5, order=order, end=end)
        if min(one.clearance for one in passes) > CLEAR:
            return weight, passes
    raise AssertionError("no seed stays clear of the boundaries")


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize(
    ("order", "end"), [("svd", "quantize"), ("quantize", "svd"), ("svd", "svd"), ("quantize", "quantize")]
)
def test_every_pass_is_that_of_the_papers(shape, order, end):
    """svd, quantize is QPiSSA; quantize, svd is LoftQ."""
    weight, passes = clear_weight(shape, order=order, end=end)
    for iterations in range(1 if (order, end) != ("quantize", "quantize") else 2, 6):
        recipe = Recipe(NF4, 3, iterations, order, end, stop="never", exact=True, dtype=torch.float32)
        split = split_weight(torch.from_numpy(weight), recipe)
        expected = [one.distance for one in passes[:iterations]]
        assert split.history == pytest.approx(expected, abs=roundoff_of(weight))
        assert split.iteration == 1 + int(np.argmin(expected))
        best = passes[split.iteration - 1]
        assert split.residual.decode().numpy() == pytest.approx(best.residual, abs=1e-5)
        assert (split.up_OR @ split.down_RI).numpy() == pytest.approx(best.low_rank, abs=1e-4)


@pytest.mark.parametrize(
    ("script", "stop", "history", "best"),
    [
        ((5, 3, 4, 1), "rise", (5, 3, 4), 2),
        ((5, 3, 4, 1), "never", (5, 3, 4, 1), 4),
        ((5, 1, 4, 2), "never", (5, 1, 4, 2), 2),
        ((1, 2, 3, 4), "rise", (1, 2), 1),
        ((1, 2, 3, 4), "never", (1, 2, 3, 4), 1),
        ((4, 3, 2, 1), "rise", (4, 3, 2, 1), 4),
    ],
)
def test_a_later_worse_step_is_discarded(script, stop, history, best):
    codec = Scripted(script)
    weight = torch.from_numpy(weight_of((16, 24)))
    split = split_weight(weight, Recipe(codec, 2, len(script), "svd", "quantize", stop, dtype=torch.float32))
    assert split.history == pytest.approx(history, abs=ROUNDOFF * 20)
    assert split.iteration == best
    assert int(split.residual.codes) == best - 1
    assert len(codec.made) == len(history)  # "rise" does no work after the rise
    assert split.error(weight).norm().item() == pytest.approx(script[best - 1], abs=ROUNDOFF * 20)


@pytest.mark.parametrize("stop", ["rise", "never"])
def test_of_equal_passes_the_first_is_kept_and_equality_is_no_rise(stop):
    weight = torch.zeros(16, 24)
    codec = Scripted((0, 0, 0))
    split = split_weight(weight, Recipe(codec, 1, 3, end="quantize", stop=stop))
    assert (split.iteration, split.history, len(codec.made)) == (1, (0.0, 0.0, 0.0), 3)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("order", "end"), [("svd", "quantize"), ("quantize", "svd"), ("svd", "svd")])
def test_the_distance_reported_is_that_of_what_is_stored(order, end, dtype, double_quant, monkeypatch):
    monkeypatch.setattr(objective, "ROWS", 89)  # so that a single row is left for the last share
    weight = weight_of((90, 70))
    recipe = Recipe(NormalFloat4(double_quant=double_quant), 8, 4, order, end, dtype=dtype)
    split = split_weight(torch.from_numpy(weight), recipe)
    assert isinstance(split.residual.scales, NestedScales) == double_quant
    assert split.up_OR.dtype == split.down_RI.dtype == dtype
    assert (split.up_OR.shape, split.down_RI.shape, split.rank) == ((90, 8), (8, 70), 8)
    assert split.history[split.iteration - 1] == min(split.history)
    assert min(split.history) == pytest.approx(distance(weight, split), abs=roundoff_of(weight))
    error = split.error(torch.from_numpy(weight)).double().norm().item()
    assert error == pytest.approx(distance(weight, split), abs=roundoff_of(weight))


def test_factors_are_fitted_to_the_double_quantized_residual():
    """Refitting them by SciPy to what the stored bytes leave improves nothing."""
    weight = weight_of((90, 70))
    codec = NormalFloat4(double_quant=True)
    split = split_weight(torch.from_numpy(weight), Recipe(codec, 8, 3, dtype=torch.float32))
    left = weight - split.residual.decode().double().numpy()
    assert min(split.history) == pytest.approx(reference.tail(left, 8), abs=roundoff_of(weight))


def test_factors_that_are_kept_made_the_double_quantized_residual():
    weight = torch.from_numpy(weight_of((90, 70)))
    codec = NormalFloat4(double_quant=True)
    split = split_weight(weight, Recipe(codec, 8, 3, end="quantize"))
    assert split.iteration > 1
    made_from = torch.addmm(weight, split.up_OR.float(), split.down_RI.float(), alpha=-1)
    assert torch.equal(split.residual.codes, codec.encode(made_from).codes)
    assert torch.equal(split.residual.decode(), codec.encode(made_from).decode())


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(("order", "end"), [("svd", "svd"), ("quantize", "quantize")])
def test_rank_0_is_the_codec_alone(order, end, double_quant):
    weight, codec = torch.from_numpy(weight_of((30, 70))), NormalFloat4(double_quant=double_quant)
    split = split_weight(weight, Recipe(codec, 0, 5, order, end))
    assert torch.equal(split.residual.codes, codec.encode(weight).codes)
    assert (split.up_OR.shape, split.down_RI.shape, split.iteration) == ((30, 0), (0, 70), 1)
    plain = np.linalg.norm(weight.numpy() - codec.encode(weight).decode().double().numpy())
    assert split.history == pytest.approx((plain,), rel=ROUNDOFF)


@given(st.integers(8, 90), st.integers(8, 90), st.integers(1, 8), st.integers(0, 999), st.floats(0, 2), st.booleans())
def test_principal_components_first_and_a_last_fit_are_never_worse_than_nf4_alone(
    rows, columns, rank, seed, power, tails
):
    weight = weight_of((rows, columns), seed, power)
    if tails:
        weight *= np.random.default_rng(seed).standard_t(3, weight.shape).astype(np.float32)
    plain = np.linalg.norm(weight - reference.nf4_round_trip(weight, double_quant=False))
    split = split_weight(torch.from_numpy(weight), Recipe(NF4, rank, 2))
    assert min(split.history) <= plain


@pytest.mark.parametrize("end", ["svd", "quantize"])
@pytest.mark.parametrize("order", ["svd", "quantize"])
def test_sketches_end_where_full_svds_do(order, end):
    """On average: which codes flip is chance, and single runs of either kind differ by 0.1 %."""
    weight = torch.from_numpy(weight_of((300, 340), power=0.7))
    full = min(split_weight(weight, Recipe(NF4, 16, 4, order, end, exact=True)).history)
    sketched = [min(split_weight(weight, Recipe(NF4, 16, 4, order, end), seed=seed).history) for seed in range(6)]
    assert abs(np.mean(sketched) / full - 1) <= SHORT[order]


def test_the_seed_decides_the_bytes():
    weight = torch.from_numpy(weight_of((300, 280)))
    splits = [split_weight(weight, Recipe(NF4, 8, 2), seed=seed) for seed in (3, 3, 4)]
    assert same_bytes(splits[0], splits[1])
    assert not torch.equal(splits[0].down_RI, splits[2].down_RI)


def test_exact_svds_need_no_seed():
    weight = torch.from_numpy(weight_of((300, 280)))
    assert same_bytes(*(split_weight(weight, Recipe(NF4, 8, 2, exact=True), seed=seed) for seed in (3, 4)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_weight_splits_like_its_float32_copy_and_is_left_as_it_was(dtype):
    weight = torch.from_numpy(weight_of((60, 50))).to(dtype)
    before = weight.clone()
    assert same_bytes(*(split_weight(one, Recipe(NF4, 4, 3)) for one in (weight, weight.float())))
    assert torch.equal(weight, before)


def test_a_float32_weight_is_left_as_it_was():
    weight = torch.from_numpy(weight_of((60, 50)))
    before = weight.clone()
    split_weight(weight, Recipe(NF4, 4, 3))
    assert torch.equal(weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_transposed_view_splits_like_its_copy(dtype):
    """As the weights of GPT-2's Conv1D come."""
    view = torch.from_numpy(weight_of((60, 50))).to(dtype).mT
    assert same_bytes(*(split_weight(one, Recipe(NF4, 4, 3)) for one in (view, view.contiguous())))


@pytest.mark.parametrize(
    ("bad", "count"), [((torch.nan,), 1), ((torch.inf, -torch.inf), 2), ((torch.nan, torch.inf, torch.nan), 3)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nans_and_infinities_are_counted(bad, count, dtype):
    weight = torch.from_numpy(reference.gaussian(12, 10)).to(dtype)
    weight.view(-1)[5 : 5 + len(bad)] = torch.tensor(bad, dtype=dtype)
    with pytest.raises(ValueError, match=f"^{count} of 120 values are NaN or infinite$"):
        split_weight(weight, Recipe(NF4, 2))


def test_a_finite_weight_whose_sum_overflows_is_split():
    weight = torch.full((4, 64), 3e38)
    assert split_weight(weight, Recipe(NF4, 0)).residual.decode().equal(weight)


@pytest.mark.parametrize("shape", [(12, 10), (10, 12)])
def test_a_rank_above_the_matrix_is_refused(shape):
    with pytest.raises(
        ValueError, match=rf"rank 11 is outside 0\.\.10, the ranks of a \({shape[0]}, {shape[1]}\) matrix"
    ):
        split_weight(torch.zeros(shape), Recipe(NF4, 11))
    assert split_weight(torch.from_numpy(reference.gaussian(*shape)), Recipe(NF4, 10)).rank == 10


def test_a_recipe_that_stores_nothing_is_refused():
    with pytest.raises(ValueError, match="rank -1 is negative"):
        Recipe(NF4, -1)
    with pytest.raises(ValueError, match="0 iterations leave nothing to store"):
        Recipe(NF4, 4, 0)
    with pytest.raises(ValueError, match="needs at least 2 iterations: after 1 the factors are still zero"):
        Recipe(NF4, 4, 1, "quantize", "quantize")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"order": "svdd"}, "order 'svdd' is not one of svd, quantize"),
        ({"end": "fit"}, "end 'fit' is not one of svd, quantize"),
        ({"stop": "x"}, "stop 'x' is not one of rise, never"),
    ],
)
def test_an_unknown_word_is_refused(options: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Recipe(NF4, 8, **options)


@pytest.mark.parametrize(
    "weight", [torch.ones(8, 8, dtype=torch.int8), torch.ones(8, 8, dtype=torch.float64), torch.ones(2, 8, 8)]
)
def test_what_is_no_16_bit_or_float32_matrix_is_refused(weight: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"a float32, bfloat16 or float16 matrix can be split, not torch\.\w+ \(.*8\)"):
        split_weight(weight, Recipe(NF4, 4))
