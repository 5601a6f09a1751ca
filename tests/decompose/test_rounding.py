"""Scales of least error, error feedback and coordinate descent, judged by their definitions in float64 NumPy."""

import json
from itertools import pairwise

import bitsandbytes.functional
import numpy
import pytest
import torch
import transformers

from qsvd.cli import run
from qsvd.decompose.alternate import Recipe, split_weight
from qsvd.decompose.feedback import State, feed_back, sweep
from qsvd.decompose.objective import PLAIN, Objective
from qsvd.decompose.rounding import round_nearest, round_with_feedback
from qsvd.numerics import codebook
from qsvd.numerics.codec import plain_scales
from qsvd.numerics.names import codec_named
from tests.checkpoints import write_checkpoint

CODECS = ["nf4", "nf4+dq", "nf2-32-fp16", "nf3-64-8x256", "nf4-16-fp32", "nf8-128-bf16"]


def matrix(rows=24, columns=256, seed=0):
    """Numbers with the tails of weights, and one column of outliers."""
    draw = numpy.random.default_rng(seed)
    values = draw.standard_t(6, (rows, columns)) * draw.uniform(0.5, 2, (rows, 1))
    values[:, 5] *= 8
    return torch.from_numpy(values.astype(numpy.float32))


def moment(columns=256, seed=1):
    """A second moment of correlated inputs."""
    draw = numpy.random.default_rng(seed)
    inputs = draw.standard_normal((3 * columns, columns)) @ numpy.diag(draw.lognormal(0, 1, columns))
    inputs[:, 1:] += inputs[:, :-1]
    return torch.from_numpy((inputs.T @ inputs / len(inputs)).astype(numpy.float32))


def error(weight_OI, packed):
    return numpy.linalg.norm(weight_OI.double() - packed.decode().double()) / numpy.linalg.norm(weight_OI.double())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_scales_are_within_one_percent_of_the_best_of_all(bits):
    blocks_BE = matrix(40, 32)
    levels_L = codebook.levels(bits).double().numpy()
    scales_B = round_nearest(blocks_BE, codec_named(f"nf{bits}-32-fp32")).scales
    found, best = 0.0, 0.0
    for block_E, scale in zip(blocks_BE.double().numpy(), scales_B.double().numpy(), strict=True):
        tried_T = numpy.outer(numpy.linspace(0.2, 1.2, 1500), [1, -1]).ravel() * numpy.abs(block_E).max()
        steps_TE = numpy.abs(block_E[:, None] - numpy.multiply.outer(tried_T, levels_L)[:, None]).min(axis=-1)
        best += numpy.square(steps_TE).sum(axis=1).min()
        found += numpy.square(numpy.abs(block_E[:, None] - scale * levels_L).min(axis=1)).sum()
    assert found < 1.02 * best  # squares
    assert (scales_B < 0).any(), "some are mirrored"


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("columns", [256, 200])
def test_better_scales_lower_the_error_for_every_codec_and_blocks_may_cross_rows(name, columns):
    weight_OI, codec = matrix(columns=columns), codec_named(name)
    assert error(weight_OI, round_nearest(weight_OI, codec)) < 0.99 * error(weight_OI, codec.encode(weight_OI))


def test_scales_are_weighted_by_column():
    weight_OI, codec = matrix(), codec_named("nf2-32-fp32")
    columns_I = torch.from_numpy(numpy.random.default_rng(2).lognormal(0, 1.5, 256).astype(numpy.float32))

    def weighted(packed):
        return float(((weight_OI - packed.decode()).double().square() * columns_I).sum())

    assert weighted(round_nearest(weight_OI, codec, columns_I)) < 0.98 * weighted(round_nearest(weight_OI, codec))


def gptq(weight_OI, moment_II, scales_BO, size):
    """Codes by algorithm 1 of arXiv:2210.17323, without its blocks: the inverse of what is left, after each column."""
    work_OI, inverse_II = weight_OI.double().numpy().copy(), numpy.linalg.inv(moment_II.double().numpy())
    levels_L, rounded_OI = codebook.levels(4).double().numpy(), numpy.empty(weight_OI.shape)
    for column in range(work_OI.shape[1]):
        scale_O = scales_BO[column // size].double().numpy()
        codes_O = numpy.abs(work_OI[:, column, None] - scale_O[:, None] * levels_L).argmin(axis=1)
        rounded_OI[:, column] = levels_L[codes_O] * scale_O
        row_I = inverse_II[column] / inverse_II[column, column]
        work_OI -= numpy.outer(work_OI[:, column] - rounded_OI[:, column], row_I)
        inverse_II = inverse_II - numpy.outer(inverse_II[:, column], row_I)
    return rounded_OI


@pytest.mark.parametrize(("name", "size"), [("nf4", 64), ("nf4-16-fp32", 16)])
def test_feedback_is_gptq_with_the_same_scales(name, size):
    weight_OI, moment_II = matrix(), moment()
    state = State.start(weight_OI, codec_named(name), None)
    feed_back(state, moment_II)
    expected_OI = gptq(weight_OI, moment_II, state.scales_CO, size)
    same = numpy.isclose((weight_OI - state.left_IO.t()).double().numpy(), expected_OI, rtol=1e-5, atol=1e-6)
    assert same.mean() > 0.99  # a number between two levels may go to the other one in float32


def test_feedback_against_the_identity_is_nearest_rounding():
    weight_OI, codec = matrix(), codec_named("nf4")
    state = State.start(weight_OI, codec, None)
    feed_back(state, torch.eye(256))
    nearest = round_nearest(weight_OI, codec)
    torch.testing.assert_close(weight_OI - state.left_IO.t(), nearest.decode())


def objective(left_IO, moment_II):
    left_OI = left_IO.t().double().numpy()
    return float(numpy.einsum("oi,ij,oj->", left_OI, moment_II.double().numpy(), left_OI))


@pytest.mark.parametrize(
    ("name", "columns"), [("nf4", 256), ("nf2-32-fp16", 200), ("nf3-64-8x256", 256), ("nf4-256", 256), ("nf4", 200)]
)
def test_no_sweep_raises_the_objective_and_no_other_scale_is_better(name, columns):
    codec = codec_named(name) if name != "nf4-256" else large_blocks()
    moment_II = moment(columns)
    state = State.start(matrix(columns=columns), codec, None)
    feed_back(state, moment_II)
    found = [objective(state.left_IO, moment_II)]
    for _ in range(3):
        sweep(state, moment_II, refits=state.is_aligned)
        found.append(objective(state.left_IO, moment_II))
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(found))
    assert found[1] < 0.995 * found[0]
    if not (state.is_aligned and codec.has_signed_scales):
        return
    last = len(state.scales_CO) - 1  # the block whose scale was chosen last
    values_EO = state.levels_of(slice(last * state.run, columns))
    for factor in (0.999, 1.001):
        moved_IO = state.left_IO.clone()
        moved_IO[last * state.run :] += (1 - factor) * values_EO * state.scales_CO[last]
        assert objective(moved_IO, moment_II) >= found[-1] * (1 - 1e-7)


def large_blocks():
    from qsvd.numerics.nf4 import NormalFloat4

    return NormalFloat4(double_quant=False, block_size=256)


KINDS = [(name, 48, 256, 8) for name in CODECS if name not in ("nf4", "nf4-16-fp32")] + [  # see nf4 below
    ("nf4+dq", 48, 200, 8),
    ("nf4", 40, 128, 0),
    ("nf3-64-8x256", 40, 128, 0),
    ("nf2-32-fp16", 24, 64, 22),
    ("nf4+dq", 1, 64, 1),
]


@pytest.mark.parametrize(("name", "rows", "columns", "rank"), KINDS)
def test_feedback_is_never_worse_than_nearest_and_better_with_components(name, rows, columns, rank):
    weight_OI, codec = matrix(rows, columns), codec_named(name)
    nearest = split_weight(weight_OI, Recipe(codec, rank, 3, scales="mse"))
    fed = split_weight(weight_OI, Recipe(codec, rank, 3, rounding="feedback"))
    assert fed.history[: len(nearest.history)] == nearest.history
    assert min(fed.history) <= min(nearest.history)
    assert fed.history[fed.iteration - 1] == min(fed.history)
    found = numpy.linalg.norm(fed.error(weight_OI).double())
    assert found == pytest.approx(min(fed.history), rel=1e-5)
    if rank == 8 and columns == 256:  # else blocks cross rows
        assert found < 0.98 * min(nearest.history)


def test_feedback_lowers_a_weighted_error():
    weight_OI, codec = matrix(48, 256), codec_named("nf4")
    weights = Objective(torch.linspace(0.5, 2, 48), torch.linspace(3, 0.2, 256))
    nearest, fed = (
        split_weight(weight_OI, Recipe(codec, 8, 3, scales="mse", rounding=rounding), objective=weights)
        for rounding in ("nearest", "feedback")
    )
    scaled = fed.error(weight_OI).double() * weights.rows_O[:, None] * weights.columns_I
    assert numpy.linalg.norm(scaled) == pytest.approx(min(fed.history), rel=1e-5)
    assert min(fed.history) < 0.97 * min(nearest.history)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        pytest.param("nf4+dq", lambda one: one.zero_(), id="zeros"),
        pytest.param("nf2-32-fp16", lambda one: one.fill_(0.25), id="one value"),
        pytest.param("nf4+dq", lambda one: one[:, :128].zero_(), id="blocks of zeros"),
        pytest.param("nf2-32-fp16", lambda one: one[:, :128].zero_(), id="blocks of zeros, with plain scales"),
        pytest.param("nf4+dq", lambda one: one[:, 3].mul_(1e4), id="an outlier column"),
        pytest.param("nf2-32-fp16", lambda one: one.mul_(1e-30), id="tiny"),
        pytest.param("nf4+dq", lambda one: one[1:].copy_(one[:1].expand(47, -1)), id="equal rows"),
    ],
)
def test_unusual_weights_are_split(name, change):
    weight_OI, codec = matrix(48, 256), codec_named(name)
    change(weight_OI)
    split = split_weight(weight_OI, Recipe(codec, 8, 2, rounding="feedback"))
    assert torch.isfinite(split.error(weight_OI)).all()
    assert min(split.history) <= split_weight(weight_OI, Recipe(codec, 8, 2, scales="mse")).history[0]


@pytest.mark.parametrize("name", ["nf2-32-8x256", "nf8-128-bf16"])
def test_codes_are_chosen_for_the_scales_that_are_stored(name):
    weight_OI, codec, columns = matrix(48, 256), codec_named(name), 256
    down_RI = torch.from_numpy(numpy.random.default_rng(3).standard_normal((8, columns)).astype(numpy.float32))
    packed = round_with_feedback(weight_OI, codec, PLAIN.metric(None, down_RI, 0.1))
    span_IR = numpy.linalg.qr(down_RI.double().numpy().T)[0]
    moment_II = 1.1 * numpy.eye(columns) - span_IR @ span_IR.T
    scale_O = plain_scales(packed.scales).view(48, -1)[:, -1].double().numpy()
    decoded_OI = packed.decode().double().numpy()
    pull_OI = (weight_OI.double().numpy() - decoded_OI) @ moment_II
    wanted_O = decoded_OI[:, -1] + pull_OI[:, -1] / moment_II[-1, -1]  # the column that was chosen last
    steps_OL = numpy.abs(wanted_O[:, None] - numpy.outer(scale_O, codebook.levels(codec.bits).double().numpy()))
    chosen_O = numpy.abs(wanted_O - decoded_OI[:, -1])
    assert (chosen_O <= steps_OL.min(axis=1) + 1e-5).all()


@pytest.mark.parametrize("double_quant", [False, True])
def test_bitsandbytes_decodes_what_was_chosen(double_quant):
    weight_OI = matrix(32, 256)
    codec = codec_named("nf4+dq" if double_quant else "nf4")
    packed = round_with_feedback(weight_OI, codec, PLAIN.metric(None, torch.zeros(1, 256), 0.01))
    scales_B = packed.scales.decode() if double_quant else packed.scales
    assert double_quant or (scales_B < 0).any(), "some blocks are mirrored"
    state = bitsandbytes.functional.QuantState(
        absmax=scales_B,
        shape=torch.Size((32, 256)),
        code=bitsandbytes.functional.get_4bit_type("nf4", device="cpu"),
        blocksize=64,
        quant_type="nf4",
        dtype=torch.float32,
    )
    theirs_OI = bitsandbytes.functional.dequantize_4bit(packed.codes.view(-1, 1), state)
    assert torch.equal(theirs_OI, packed.decode())


def test_transformers_loads_a_model_with_feedback_and_a_repeat_has_the_same_bytes(tmp_path):
    source, feedback = tmp_path / "source", ["--iterations", "2", "--rounding", "feedback"]
    write_checkpoint(source, num_hidden_layers=1)
    for name, how in {"a": feedback, "b": feedback, "plain": ["--iterations", "1"]}.items():
        command = ["quantize", str(source), "--out", str(tmp_path / name), "--rank", "4", "--device", "cpu"]
        assert run([*command, *how]) == 0
    weights, repeated = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert weights == repeated
    assert "rounded with error feedback" in (tmp_path / "a" / "report.md").read_text()
    errors = {
        name: json.loads((tmp_path / name / "errors.jsonl").read_text().splitlines()[0])["after"]["frobenius"]
        for name in ("a", "plain")
    }
    assert errors["a"] < 0.97 * errors["plain"]
    tokens = torch.arange(20)[None]
    whole, ours = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(tokens).logits
        for folder in (source, tmp_path / "a")
    )
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    assert (ours - whole).norm() < (plain.eval()(tokens).logits - whole).norm()
