"""Float32's roundoff in eigenvalues near zero does not count as a nuclear norm."""

import pytest
import torch

from qsvd.numerics.norms import norms


def test_the_estimated_nuclear_norm_of_a_nearly_rank_1_error_is_right() -> None:
    matrix = torch.zeros(1100, 1200)
    matrix[7] = torch.randn(1200, generator=torch.Generator().manual_seed(0))
    found = norms(matrix, torch.Generator().manual_seed(0))
    only_value = float(matrix.double().norm())  # the one singular value is also the sum of all
    assert found.nuclear == pytest.approx(only_value, abs=1e-3 * only_value + 4 * found.nuclear_error)
