"""LoRA-Mini's frozen factors: the singular directions of the components, by NumPy, and random orthonormal ones."""

import numpy as np
import pytest
import torch

from qsvd.adapters.adapter import AdapterOptions
from qsvd.adapters.methods.lora_mini import LoraMini
from tests.adapters.principals import principal_of

SHAPE = (33, 64)
ROUNDOFF = 1e-5  # of float32 columns whose products have up to 64 terms


def outer_of(rank, *, outer_out=6, outer_in=9, seed=0, dtype=torch.float32):
    """B_o [O, b] and A_o [a, I] beside components of this rank, float64."""
    principal = principal_of(SHAPE, rank, dtype=dtype)
    options = AdapterOptions("lora-mini", rank=2, own={"outer_out": outer_out, "outer_in": outer_in})
    adapter = LoraMini.start(principal, options, torch.Generator().manual_seed(seed))
    return principal, adapter.outer_up.double().numpy(), adapter.frozen_down[rank:].double().numpy()


@pytest.mark.parametrize("rank", [0, 4, 12])
def test_the_outer_factors_are_orthonormal_and_begin_with_the_singular_directions(rank):
    principal, left, right = outer_of(rank)
    np.testing.assert_allclose(left.T @ left, np.eye(6), atol=ROUNDOFF)
    np.testing.assert_allclose(right @ right.T, np.eye(9), atol=ROUNDOFF)
    exact = np.linalg.svd((principal.up_OR.double() @ principal.down_RI.double()).numpy())
    for ours, theirs in ((left.T, exact[0].T), (right, exact[2])):
        known = min(rank, len(ours))
        overlaps = np.abs((ours[:known] * theirs[:known]).sum(axis=1))  # signs are free
        np.testing.assert_allclose(overlaps, np.ones(known), atol=ROUNDOFF)
        np.testing.assert_allclose(ours[known:] @ theirs[:known].T, 0, atol=ROUNDOFF)


def test_random_directions_are_those_of_the_generator_alone():
    for one, same, other in zip(*(outer_of(0, seed=seed)[1:] for seed in (3, 3, 4)), strict=True):
        assert np.array_equal(one, same)
        assert not np.array_equal(one, other)


def test_outer_sizes_are_cut_to_the_sides_of_the_weight():
    _, left, right = outer_of(2, outer_out=500, outer_in=500)
    assert left.shape == (33, 33)
    assert right.shape == (64, 64)


def test_an_export_has_the_rank_of_the_inner_factors():
    principal = principal_of(SHAPE, 4, dtype=torch.bfloat16)
    options = AdapterOptions("lora-mini", rank=2, own={"outer_out": 6, "outer_in": 9})
    adapter = LoraMini.start(principal, options, torch.Generator().manual_seed(0))
    with torch.no_grad():
        adapter.inner_up.normal_(generator=torch.Generator().manual_seed(1))
    (up, down), (all_up, all_down) = adapter.exported(), adapter.factors()
    assert (up.shape[1], all_up.shape[1]) == (4 + 2, 4 + 9)
    product = all_up.double() @ all_down.double()
    torch.testing.assert_close(up.double() @ down.double(), product, rtol=0, atol=ROUNDOFF * product.abs().max().item())
