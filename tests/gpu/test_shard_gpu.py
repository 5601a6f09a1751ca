"""A residual that FSDP2 gathers block by block on a GPU, by one process: the gradients of a residual that stays."""

import pytest
import torch
from torch import distributed
from torch.nn.attention import SDPBackend, sdpa_kernel

import qsvd
from qsvd.adapters.model import split_linears
from qsvd.memory.items import Placement
from tests.adapters.results import IDS, split_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return split_checkpoint(tmp_path_factory.mktemp("shard"), num_hidden_layers=5)


@pytest.fixture(scope="module", autouse=True)
def _group():
    distributed.init_process_group("nccl", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def gradients(out, placement, *, checkpointing):
    model = qsvd.load(
        out,
        options=qsvd.AdapterOptions("lora", rank=2),
        device="cuda",
        dtype=torch.float32,
        placement=placement,
    ).train()
    if checkpointing:
        model.activation_checkpointing_enable()
        model.enable_input_require_grads()
    ids = IDS.cuda()
    with sdpa_kernel(SDPBackend.MATH):
        for _ in range(2):
            model.zero_grad()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return model, [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("resident", [None, 0])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gathered_blocks_give_the_gradients_of_blocks_that_stay(out, resident, checkpointing):
    _, expected = gradients(out, Placement(), checkpointing=checkpointing)
    model, found = gradients(out, Placement(resident, shards=1), checkpointing=checkpointing)
    assert all(map(torch.equal, found, expected))
    places = {page.to_local().device.type for page in next(split_linears(model))[1].paged.cache.pages()}
    assert places == {"cuda" if resident is None else "cpu"}
