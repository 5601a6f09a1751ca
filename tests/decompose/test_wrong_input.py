"""What a Recipe or split_weight cannot mean is refused with the value and what is allowed."""

import pytest
import torch

from qsvd.decompose.alternate import Recipe, split_weight
from qsvd.numerics.nf4 import NormalFloat4

NF4 = NormalFloat4(double_quant=False)


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
