"""The kernels of qsvd.decompose without a GPU, for kernel_checks.py: interpreted and compiled.

What is interpreted is compared with the definition in float64 NumPy.
"""

from itertools import product

import numpy
import torch

from qsvd.decompose import feedback, kernels, row_feedback
from qsvd.decompose.alternate import Recipe, split_weight
from qsvd.decompose.columns import Columns
from qsvd.decompose.moments import Moments
from qsvd.numerics.names import codec_named

NAMES = ("nf4", "nf2-16-fp32", "nf3-32-fp16", "nf8-128-bf16", "int4-32")
SIZES = ((3, 2, 70), (16, 1, 3), (17, 1, 3))  # columns of a tile, matrices, rows of each: two programs in the first


def drawn(draw, *shape):
    return torch.from_numpy(draw.standard_normal(shape).astype(numpy.float32))


def nearest(levels, wanted):
    return numpy.abs(wanted[:, None] - levels).argmin(axis=1)


def chosen_by_definition(given):
    """Columns in order, one matrix after another."""
    before, pulls, moves, scales = (
        one.double().numpy() for one in (given.before_EPG, given.pulls_EPG, given.moves_EEP, given.scales_CPG)
    )
    levels = given.codec.levels(torch.device("cpu")).double().numpy()
    codes, values = numpy.empty(before.shape, dtype=int), numpy.empty(before.shape)
    for at, matrix in product(range(len(before)), range(before.shape[1])):
        pull = pulls[at, matrix] - moves[:at, at, matrix] @ (values - before)[:at, matrix]
        wanted = pull if given.reach_E is None else before[at, matrix] + float(given.reach_E[at]) * pull
        scale = scales[at // given.run, matrix]
        codes[at, matrix] = nearest(levels, numpy.divide(wanted, scale, where=scale != 0, out=numpy.zeros(len(scale))))
        values[at, matrix] = levels[codes[at, matrix]] * scale
    return codes, values


def columns_right(name, size, seed):
    draw, codec = numpy.random.default_rng(seed), codec_named(name)
    (width, count, height), run = size, (1, size[0])[seed % 2]  # blocks cross rows, or end with the tile or later
    scales_CPG = 0.3 + drawn(draw, -(-width // run), count, height).abs()
    scales_CPG[0, 0, 1] = 0
    scales_CPG[0, 0, 2] *= -1
    moves_EEP = 0.2 * drawn(draw, width, width, count)
    given = (drawn(draw, *size), drawn(draw, *size), moves_EEP, scales_CPG, run)
    for reach_E in (None, 0.5 + drawn(draw, width).abs()):
        tile = Columns(codec, *given, reach_E)
        for found, wanted in zip(kernels.chosen(tile), chosen_by_definition(tile), strict=True):
            numpy.testing.assert_allclose(found.double().numpy(), wanted, rtol=1e-6, atol=1e-7)


def changed_by_definition(levels, values, scales, pulls, inputs, outputs):
    """Columns in order; all rows are changed if that lowers tr(G E H E^T), else none."""
    values, moved = values.copy(), numpy.zeros(values.shape)
    kept = []
    for at in range(len(values)):
        pull = pulls[at] - inputs[at, :at] @ moved[:at]
        wanted = values[at] + pull / (inputs[at, at] * outputs.diagonal())
        new = levels[nearest(levels, wanted / scales[at])] * scales[at]
        change = new - values[at]
        # the error E = T - Q loses this change at one column: G, H and `pull` = H E G say what that does
        lowers = 2 * change @ pull - inputs[at, at] * change @ outputs @ change > 0
        kept.append(lowers)
        if lowers:
            values[at], moved[at] = new, change @ outputs
    return values, moved, kept


def changes_right(name, width, rows, seed):
    draw, codec = numpy.random.default_rng(seed), codec_named(name)
    inputs, outputs = (numpy.cov(draw.standard_normal((side, 3 * side))) for side in (width, rows))
    outputs += 0.3  # rows that meet, so that some common changes are refused
    levels = codec.levels(torch.device("cpu"))
    codes_EG = torch.from_numpy(draw.integers(len(levels), size=(width, rows)).astype(numpy.uint8))
    scales_EG = 0.3 + drawn(draw, width, rows).abs()
    values_EG = levels[codes_EG.int()] * scales_EG
    pulls_EG = drawn(draw, width, rows)
    own_EE, own_GG = (torch.from_numpy(one.astype(numpy.float32)) for one in (inputs, outputs))
    known = (one.double().numpy() for one in (levels, values_EG, scales_EG, pulls_EG, own_EE, own_GG))
    values, moved, kept = changed_by_definition(*known)
    found_EG = kernels.changed(codec, (values_EG, codes_EG, scales_EG), pulls_EG, own_EE, own_GG)
    numpy.testing.assert_allclose(values_EG.double().numpy(), values, rtol=1e-5, atol=1e-6)
    numpy.testing.assert_allclose(found_EG.double().numpy(), moved, rtol=1e-4, atol=1e-5)
    assert torch.equal(levels[codes_EG.int()] * scales_EG, values_EG), "codes and values belong together"
    return kept


def splits_right():
    """Splits by the kernels have the error of splits by torch's operations, with one moment and with two."""
    draw = numpy.random.default_rng(3)
    weight_OI, (inputs_II, outputs_OO) = drawn(draw, 4, 16), (drawn(draw, 50, side) for side in (16, 4))
    recipe = Recipe(codec_named("nf4-16-fp32"), 2, iterations=1, rounding="feedback")
    for objective in (Moments(inputs_II.T @ inputs_II), Moments(inputs_II.T @ inputs_II, outputs_OO.T @ outputs_OO)):
        errors = []
        for found in (None, kernels):
            feedback.kernels_for = row_feedback.kernels_for = lambda _, found=found: found
            errors.append(split_weight(weight_OI, recipe, objective=objective).history[-1])
        numpy.testing.assert_allclose(*errors, rtol=1e-3)


def interpret():
    """Every width, with blocks as long as the tile and shorter ones; the number of comparisons."""
    for number, (name, size) in enumerate(zip(NAMES, (*SIZES, *SIZES), strict=False)):
        columns_right(name, size, number)
    kept = [*changes_right("nf4", 17, 40, 0), *changes_right("nf2-16-fp32", 6, 17, 1)]
    assert {True, False} == set(kept), "some changes are made, some are refused"
    splits_right()
    return len(NAMES) + 3


def compiled(stand_in):
    """Both kernels, as they are launched for a tile of 64 columns; nothing is fused.

    Args:
        stand_in: Takes the place of a kernel and compiles what it would launch.
    """
    kernels._columns, kernels._meeting = stand_in(kernels._columns), stand_in(kernels._meeting)
    codec, ones = codec_named("nf4"), torch.ones(64, 128)
    for reach_E in (None, torch.ones(64)):
        kernels.chosen(Columns(codec, ones[:, None], ones[:, None], torch.ones(64, 64, 1), ones[:1, None], 64, reach_E))
    kernels.changed(codec, (ones, ones.byte(), ones), ones, torch.ones(64, 64), torch.ones(128, 128))
    found = [*kernels._columns.found, *kernels._meeting.found]
    assert not [text for text in found if "fma" in text or ".ftz" in text]
    return len(found)
