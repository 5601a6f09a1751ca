"""What a method says of its tensors is what a started adapter has."""

import itertools

import pytest
import torch

from qsvd.adapters.adapter import AdapterOptions, StoredWeight
from qsvd.adapters.methods.table import METHODS
from qsvd.numerics.nf4 import NormalFloat4

SHAPES = [(48, 80), (80, 48), (64, 64)]
ADDED = (
    "dora",
    "adalora",
    "lora-fa",
    "vera",
    "lora-ga",
    "randlora",
    "melora",
    "kron-lora",
    "singlora",
    "symlora",
    "lora-mini",
    "lorta",
    "lora2",
    "r-lora",
    "delta-lora",
    "weightlora",
    "xgblora",
)


OWN = [
    ("mo-sara", {"cores": 2}),
    ("r-lora", {"heads": 3}),
    ("melora", {"blocks": 16}),
    ("kron-lora", {"kron_out": 8}),
    ("lora-mini", {"outer_out": 8, "outer_in": 6}),
]


def started(method, shape, stored_rank, rank, dtypes, own=None):
    """An adapter beside a random residual; dtypes are of what is trained and of what is stored."""
    generator = torch.Generator().manual_seed(0)
    trained_dtype, stored_dtype = dtypes
    residual = NormalFloat4(double_quant=True).encode(torch.randn(shape, generator=generator))
    up, down = torch.randn(shape[0], stored_rank), torch.randn(stored_rank, shape[1])
    principal = StoredWeight(residual, up.to(stored_dtype), down.to(stored_dtype))
    options = AdapterOptions(method, rank=rank, dtype=str(trained_dtype).removeprefix("torch."), own=own or {})
    return METHODS[method].start(principal, options, generator)


def principal_residual(rows, columns):
    return NormalFloat4(double_quant=True).encode(torch.zeros(rows, columns))


def described(tensors):
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors}


@pytest.mark.parametrize(
    ("method", "stored_rank", "rank"),
    [("pissa", 8, 8), ("lora", 0, 4), ("lora", 8, 4), ("lora", 8, 64), ("edora", 8, 8), ("edora", 8, 3)]
    + [("lora-xs", 8, 3), ("sorsa", 8, 8), ("sara", 8, 8), ("sara", 8, 64), ("mo-sara", 8, 3), ("randlora", 8, 64)]
    + [(method, stored, 4) for method in ADDED for stored in (0, 8)]
    + [("cora", 8, 4), ("cora", 8, 8), ("losa", 0, 4), ("losa", 8, 4)],
)
def test_parameters_and_buffers_are_those_of_a_started_adapter(method, stored_rank, rank):
    dtypes = (torch.float32, torch.bfloat16)
    for shape, trained, stored in itertools.product(SHAPES, dtypes, dtypes):
        adapter = started(method, shape, stored_rank, rank, (trained, stored))
        said = METHODS[method].tensors(shape, stored_rank, rank, trained, stored)
        assert described(said.trained.items()) == described(adapter.named_parameters())
        assert described((said.buffers | said.shared).items()) == described(adapter.named_buffers())


@pytest.mark.parametrize(("method", "own"), OWN)
def test_options_of_the_methods_own_change_them(method, own):
    dtypes = (torch.float32, torch.bfloat16)
    options = METHODS[method].options(**own)
    for shape in SHAPES:
        adapter = started(method, shape, 8, 4, dtypes, own)
        said = METHODS[method].tensors_for(options, shape, 8, 4, dtypes)
        assert described(said.trained.items()) == described(adapter.named_parameters())
        assert described((said.buffers | said.shared).items()) == described(adapter.named_buffers())
    usual = METHODS[method].tensors(SHAPES[0], 8, 4, *dtypes)
    other = METHODS[method].tensors_for(options, SHAPES[0], 8, 4, dtypes)
    assert (usual.trained, usual.buffers) != (other.trained, other.buffers)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("method", "stored_rank"),
    [("pissa", 8), ("lora", 0), ("lora", 8), ("edora", 8), ("lora-xs", 8), ("sorsa", 8), ("sara", 8), ("mo-sara", 8)]
    + [(method, stored) for method in ADDED for stored in (0, 8)]
    + [("cora", 8)],
)
def test_what_is_made_is_what_autograd_keeps_beside_them(method, stored_rank, stored):
    adapter = started(
        method,
        (48, 80),
        stored_rank,
        8 if method in ("pissa", "edora", "lora-xs", "sorsa") else 4,
        (torch.float32, stored),
    )
    own = {tensor.untyped_storage().data_ptr() for tensor in (*adapter.parameters(), *adapter.buffers())}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own and tensor.numel() > 1:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        up, down = adapter.factors()
        gain = adapter.gain(lambda: principal_residual(48, 80))
        factors = [factor for factor in (up, down, gain) if factor is not None]
        (sum((factor**2).sum() for factor in factors))  # each square keeps its factor
    for factor in factors:  # the layer keeps those without a gradient too
        keep(factor)
    said = METHODS[method].tensors(
        (48, 80), stored_rank, 8 if method in ("pissa", "edora", "lora-xs", "sorsa") else 4, torch.float32, stored
    )
    assert sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) == sum(
        tensor.num_bytes for tensor in said.made.values()
    )
