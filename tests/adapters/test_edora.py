"""EDoRA against its formula in float64, with NumPy's singular value decomposition.

Shape suffixes: O = out features, I = in features, R = stored rank, K = trained rank.
"""

import numpy as np
import pytest
import torch

from qsvd.adapters.adapter import AdapterOptions, StoredWeight
from qsvd.adapters.linear import SplitLinear
from qsvd.adapters.methods.edora import EDora
from tests import reference
from tests.adapters.principals import UNIT, decoded, dense_output, packed_residual, principal_of

SHAPE, RANK, TOKENS = (70, 172), 4, 9
ROUNDINGS = 2 * (sum(SHAPE) + RANK)  # a decomposition's error, relative to the norm, and a sum's: of float32
PRODUCTS = 12  # roundings beside the sums


def started(principal, *, dtype="float32", **options):
    return EDora.start(principal, AdapterOptions("edora", dtype=dtype, **options), torch.Generator())


def moved(adapter, *, seed=5):
    """After some training: a core and magnitudes that are not those of the start."""
    with torch.no_grad():
        core = reference.gaussian(*adapter.core.shape, seed=seed)
        adapter.core.copy_(torch.from_numpy(core) / 4)
        adapter.magnitude.mul_(torch.linspace(0.5, 1.5, len(adapter.magnitude)))
    return adapter


def separated(dtype=torch.float32):
    """Factors whose product has the singular values 4, 3, 2, 1: no two directions can be taken for each other."""
    left, right = (np.linalg.qr(reference.gaussian(side, RANK, seed=side))[0] for side in SHAPE)
    mixing = np.linalg.qr(reference.gaussian(RANK, RANK))[0] * np.array(
        [1.0, 2, 3, 4]
    )  # up and down: neither is orthogonal
    up, down = left * np.array([4.0, 3, 2, 1]) @ mixing, np.linalg.inv(mixing) @ right.T
    return StoredWeight(packed_residual(SHAPE), *(torch.from_numpy(f).to(dtype).contiguous() for f in (up, down)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("alpha", [None, 3.0])
def test_the_weight_is_that_of_the_paper_with_numpys_singular_vectors(rank, alpha, dtype):
    """V = Q + U (I + s R) S V^T; a direction's sign is free, so R is taken over to NumPy's signs."""
    principal = separated(dtype)
    adapter = moved(started(principal, rank=rank, alpha=alpha))
    up, down = (factor.detach().double().numpy() for factor in adapter.factors())
    stored = principal.up_OR.double().numpy() @ principal.down_RI.double().numpy()
    left, values, right = np.linalg.svd(stored, full_matrices=False)
    signs = np.sign((left[:, :rank] * adapter.get_buffer("directions").double().numpy()).sum(axis=0))
    core = np.zeros((RANK, RANK))
    core[:rank, :rank] = signs[:, None] * adapter.core.detach().double().numpy() * signs
    core *= 1 if alpha is None else alpha / rank
    exact = left[:, :RANK] @ (np.eye(RANK) + core) @ (values[:RANK, None] * right[:RANK])
    gap = min(np.diff(-values[: RANK + 1]))
    turned = ROUNDINGS * UNIT[torch.float32] * values[0] / gap  # Wedin: a direction turns by error over gap
    turned += 0 if dtype == torch.float32 else UNIT[torch.bfloat16]  # and is stored like the factors
    change = np.linalg.norm(core, 2) * values[0]
    roundoff = (
        ROUNDINGS * UNIT[torch.float32] * np.linalg.norm(adapter.get_buffer("inner").numpy()) * np.linalg.norm(down)
    )
    assert np.linalg.norm(up @ down - exact, 2) <= 2 * rank**0.5 * turned * change + roundoff
    assert np.linalg.norm(exact - stored, 2) > 100 * roundoff, "the core moved it"


def test_a_rank_below_the_stored_one_trains_the_largest_directions_and_keeps_the_others():
    principal = separated()
    adapter = started(principal, rank=2)
    left = np.linalg.svd(principal.up_OR.double().numpy() @ principal.down_RI.double().numpy())[0][:, :2]
    cosines = np.linalg.svd(left.T @ adapter.get_buffer("directions").double().numpy())[1]
    assert cosines == pytest.approx(1, abs=ROUNDINGS * UNIT[torch.float32] * 4)
    assert torch.equal(adapter.factors()[0], principal.up_OR)
    assert adapter.core.shape == (2, 2)


def zero_rows():
    """Rows 0 to 2 of Q + P are zero, of Q and P or because they cancel: Q = -1 in row 2, P = 1."""
    codec = packed_residual((1, 1)).codec
    matrix = torch.from_numpy(reference.gaussian(8, 64))
    matrix[:2], matrix[2] = 0, -1
    up = torch.from_numpy(reference.gaussian(8, 1))
    up[:2], up[2] = 0, 1
    return StoredWeight(codec.encode(matrix), up, torch.ones(1, 64))


def deficient():
    """Three stored components of which one is zero and two are the same."""
    principal = principal_of((33, 64), 3)
    principal.up_OR[:, 1] = principal.up_OR[:, 0]
    principal.up_OR[:, 2] = 0
    return principal


PRINCIPALS = {
    "blocks that cross rows": lambda: principal_of((70, 172), 16),
    "double quantization": lambda: principal_of((70, 172), 16, double_quant=True),
    "bfloat16 factors": lambda: principal_of((70, 172), 16, dtype=torch.bfloat16),
    "full rank": lambda: principal_of((3, 5), 3),
    "one number": lambda: principal_of((1, 1), 1),
    "rows of zeros": zero_rows,
    "deficient factors": deficient,
    "factors of zeros": lambda: StoredWeight(packed_residual((33, 64)), torch.zeros(33, 3), torch.zeros(3, 64)),
}


@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("kind", PRINCIPALS)
def test_the_gain_starts_at_exactly_1(kind, rank):
    principal = PRINCIPALS[kind]()
    gain = started(principal, rank=rank).gain(None)
    assert torch.equal(gain, torch.ones(principal.residual.shape[0]))


def test_autocast_does_not_round_the_norms(monkeypatch):
    principal, gains, gain = principal_of(SHAPE, RANK), [], EDora.gain
    monkeypatch.setattr(EDora, "gain", lambda self, read: gains.append(gain(self, read)) or gains[-1])
    module = SplitLinear(principal.residual, started(principal), None)
    with torch.autocast("cpu", torch.bfloat16):
        module(torch.ones(1, SHAPE[1]))
    assert torch.equal(gains[0], torch.ones(SHAPE[0]))


@pytest.mark.parametrize("kind", PRINCIPALS)
def test_after_a_step_everything_is_finite(kind):
    principal = PRINCIPALS[kind]()
    adapter = started(principal)
    module = SplitLinear(principal.residual, adapter, None)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        module(torch.from_numpy(reference.gaussian(TOKENS, principal.residual.shape[1]))).square().sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in adapter.parameters())
        optimizer.step()
    assert torch.isfinite(adapter.gain(None)).all()


def operands(adapter, principal):
    """Q, B0, A0, the directions, R and m in float64; the last two are leaves."""
    frozen = [decoded(principal.residual), *(t.double() for t in (principal.up_OR, principal.down_RI))]
    trained = [t.detach().double().requires_grad_() for t in (adapter.core, adapter.magnitude)]
    return [*frozen, adapter.get_buffer("directions").double(), *trained]


def up_of(adapter, stored_up, directions, core):
    return stored_up + adapter.scale * directions @ core @ (directions.T @ stored_up)


def condition(residual, up, down):
    """How many times the roundoff of a row's three terms grows relative to their sum, the squared norm; at most."""
    terms = (
        dense_output(torch.eye(residual.shape[1]).double(), residual.abs(), up.abs(), down.abs()).T.square().sum(dim=1)
    )
    return (terms / (residual + up @ down).square().sum(dim=1)).max().item()


@pytest.mark.parametrize("rank", [4, 2])
def test_the_norms_are_those_of_the_rows_in_float64(rank):
    principal = principal_of(SHAPE, RANK)
    adapter = moved(started(principal, rank=rank, alpha=3.0))
    residual, stored_up, down, directions, core, magnitude = (t.detach() for t in operands(adapter, principal))
    up = up_of(adapter, stored_up, directions, core)
    norms = (residual + up @ down).norm(dim=1)
    roundoff = (ROUNDINGS + PRODUCTS) * UNIT[torch.float32] * condition(residual, up, down)
    assert torch.allclose(adapter.gain(None).double() * norms, magnitude, rtol=roundoff, atol=0)
    start = (residual + stored_up @ down).norm(dim=1)
    assert torch.allclose(started(principal).magnitude.double(), start, rtol=roundoff, atol=0)


def gradients(adapter, dense, x, dy, norms):
    """Of R and m, through m V / norms."""
    residual, stored_up, down, directions, core, magnitude = dense
    up = up_of(adapter, stored_up, directions, core)
    norms = (residual + up @ down).norm(dim=1) if norms is None else norms
    return torch.autograd.grad(dense_output(x, residual, up, down, magnitude / norms), [core, magnitude], dy)


@pytest.mark.parametrize("rank", [4, 2])
def test_gradients_of_core_and_magnitude_are_autograds_with_the_norm_held_fixed(rank):
    principal = principal_of(SHAPE, RANK)
    adapter = moved(started(principal, rank=rank, alpha=3.0))
    x, dy = (torch.from_numpy(reference.gaussian(TOKENS, side, seed=side)) for side in reversed(SHAPE))
    SplitLinear(principal.residual, adapter, None)(x).backward(dy)
    dense = operands(adapter, principal)
    up = up_of(adapter, dense[1], dense[3], dense[4]).detach()
    norms = (dense[0] + up @ dense[2]).norm(dim=1)
    exact = gradients(adapter, dense, x.double(), dy.double(), norms)
    absolute = [t.detach().abs().requires_grad_(t.requires_grad) for t in dense]
    sizes = gradients(adapter, absolute, x.abs().double(), dy.abs().double(), norms)
    roundoff = (ROUNDINGS + TOKENS + PRODUCTS) * UNIT[torch.float32] * (1 + condition(dense[0], up, dense[2]))
    for ours, other, size in zip((adapter.core.grad, adapter.magnitude.grad), exact, sizes, strict=True):
        assert ((ours.double() - other).abs() <= roundoff * size).all()
    followed, _ = gradients(adapter, dense, x.double(), dy.double(), None)
    assert ((followed - exact[0]).abs() > 10 * roundoff * sizes[0]).any(), "a norm that is followed would be seen"


def test_the_adapter_takes_no_memory_of_the_size_of_the_weight():
    adapter = started(principal_of((64, 128), 4))
    assert max(t.numel() for t in (*adapter.parameters(), *adapter.buffers())) <= 4 * 128


def test_the_directions_do_not_depend_on_the_signs_that_a_decomposition_finds(monkeypatch):
    """A core that was saved on one machine must mean the same on another, whose LAPACK may flip vectors."""
    principal, svd = separated(), torch.linalg.svd
    here = started(principal).get_buffer("directions")

    def flipped(matrix, **options):
        found = svd(matrix, **options)
        signs = torch.tensor([(-1.0) ** column for column in range(len(matrix))], dtype=matrix.dtype)
        return type(found)((found.U * signs, found.S, found.Vh * signs[:, None]))

    monkeypatch.setattr(torch.linalg, "svd", flipped)
    assert torch.equal(here, started(principal).get_buffer("directions"))
