"""What the loop refuses, and the sentence it says."""

import pytest
import torch

from qsvd.decompose.alternate import Recipe, split_weight
from qsvd.numerics.nf4 import NormalFloat4
from tests import reference

NF4 = NormalFloat4(double_quant=False)


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
