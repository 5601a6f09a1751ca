"""What training changed, as two factors: NumPy's product and singular values in float64."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qsvd.export.lora import difference
from qsvd.export.trained import Trained
from tests.export.cases import EPS32, products


def drawn(shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40)
@given(
    st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(0, 12), st.integers(0, 12)),
    st.sampled_from([1e-3, 1.0, 1e4]),
    st.booleans(),
)
def test_the_difference_is_right_balanced_and_of_the_least_rank(shape, scale, is_near):
    rows, columns, trained_rank, stored_rank = shape
    stored = (drawn((rows, stored_rank), 1).bfloat16(), scale * drawn((stored_rank, columns), 2))
    up, down = drawn((rows, trained_rank), 3), scale * drawn((trained_rank, columns), 4)
    if is_near:
        up, down = (
            s.float() + 1e-3 * d for s, d in zip(stored, (drawn((rows, stored_rank), 3), stored[1]), strict=True)
        )
    exact, size = products(Trained(up, down), stored)
    new_up, new_down = (factor.numpy() for factor in difference(Trained(up, down), stored))
    values = np.linalg.svd(exact, compute_uv=False)
    assert new_up.shape[1] == new_down.shape[0] == (values > EPS32 * size).sum()
    assert np.linalg.norm(new_up @ new_down - exact, 2) <= 2 * EPS32 * size
    np.testing.assert_allclose(new_up.T @ new_up, new_down @ new_down.T, atol=1e-10 * (values.max(initial=0) + 1e-300))


def test_nothing_trained_is_rank_0_and_without_stored_factors_the_product_itself_is_left():
    up, down = drawn((30, 5), 0), drawn((5, 20), 1)
    assert difference(Trained(up, down), (up, down))[0].shape == (30, 0)
    assert difference(Trained(2 * up, down / 2), (up, down))[0].shape == (30, 0)
    new_up, new_down = difference(Trained(up, down), None)
    assert new_up.shape == (30, 5)
    torch.testing.assert_close(new_up @ new_down, up.double() @ down.double())
