"""The splits of the literature against slower definitions in float64."""

import numpy
import pytest
import torch
from splits.published import GPTQ_DAMPING, Weight, gptq, low_rank

from qsvd.numerics import codebook
from qsvd.numerics.names import codec_named

ROUNDOFF = 1e-9  # of sums of a few hundred float64 numbers


def drawn(rows, columns, seed):
    """A matrix and a second moment of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    inputs = torch.randn(3 * columns, columns, generator=generator, dtype=torch.float64) @ (mixed + torch.eye(columns))
    moment = inputs.T @ inputs / len(inputs)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return Weight(weight, moment, torch.eye(rows), torch.ones(rows), torch.ones(columns))


def optimal_brain_quantization(weight, moment, codec):
    """Round column by column; after each, the later columns take their least-squares values given its error."""
    rows, columns = weight.shape
    size, levels = codec.block_size, codebook.levels(codec.bits).double().numpy()
    flat_scales = numpy.abs(numpy.resize(weight, -(-weight.size // size) * size).reshape(-1, size)).max(axis=1)
    work, rounded = weight.copy(), numpy.empty_like(weight)
    for column in range(columns):
        for row in range(rows):
            if columns % size:
                scale = flat_scales[(row * columns + column) // size]
            elif column % size == 0:
                scale = flat_scales[row] = numpy.abs(work[row, column : column + size]).max()
            else:
                scale = flat_scales[row]
            scale = numpy.float64(torch.tensor(scale).to(codec.scale_dtype))
            rounded[row, column] = scale * levels[numpy.abs(work[row, column] / scale - levels).argmin()]
        later = slice(column + 1, columns)
        error = work[:, column] - rounded[:, column]
        # The error of the later columns that makes e H e^T least, for this error of this column.
        work[:, later] += numpy.outer(error, numpy.linalg.solve(moment[later, later], moment[later, column]))
    return rounded


@pytest.mark.parametrize(("columns", "name"), [(192, "nf4"), (256, "nf3-64-fp16"), (96, "nf4")])
def test_gptq_gives_the_later_columns_their_best_values(columns, name):
    drawn_weight, codec = drawn(6, columns, seed=columns), codec_named(name)
    moment = drawn_weight.inputs_II.numpy().copy()
    moment += GPTQ_DAMPING * moment.diagonal().mean() * numpy.eye(columns)
    found = gptq(drawn_weight.weight_OI, drawn_weight.upper_II, codec).numpy()
    wanted = optimal_brain_quantization(drawn_weight.weight_OI.numpy(), moment, codec)
    numpy.testing.assert_allclose(found, wanted, rtol=0, atol=ROUNDOFF)


def test_components_in_the_norm_of_the_inputs_have_no_gradient():
    weight = drawn(48, 64, seed=1)
    up, down = (part.requires_grad_() for part in low_rank(weight.weight_OI, 5, weight.root_II))
    error = weight.weight_OI - up @ down
    (error @ weight.inputs_II * error).sum().backward()
    size = float((weight.weight_OI @ weight.inputs_II).norm())
    # The root has a damping of 1e-6 of the mean, which moves the minimum by as much.
    assert max(float(part.grad.norm()) for part in (up, down)) < 1e-5 * size
    assert float(error.detach().norm()) < float(weight.weight_OI.norm())
