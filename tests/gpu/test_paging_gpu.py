"""Pages on a GPU: streamed from pinned memory, through a ring and from disk, to the bits of residuals that stay."""

import gc

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import qsvd
from qsvd.adapters.model import split_linears, trained
from qsvd.adapters.pages import buffers as page_buffers
from qsvd.adapters.pages.buffers import PinnedSlot, RingSlot
from qsvd.memory.items import Placement
from tests.adapters.results import IDS, split_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LAYERS = 9


@pytest.fixture(autouse=True)
def _exact_attention():
    """The backward passes of the fused kernels add in an order that differs from run to run."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": LAYERS}
    return split_checkpoint(tmp_path_factory.mktemp("result"), rank=16, **sizes)


def load(out, placement, method="pissa"):
    return qsvd.load(out, options=qsvd.AdapterOptions(method, seed=3), device="cuda", placement=placement)


def slots_of(model):
    return next(linear.paged.cache for _, linear in split_linears(model) if linear.paged)._slots


def steps(model, *, checkpointing):
    """Losses, gradients, logits and generated tokens of three steps."""
    ids, seen = IDS.cuda(), []
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-3)
    if checkpointing:
        model.activation_checkpointing_enable()
    for _ in range(3):
        model.train()
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        seen += [loss.detach(), *(parameter.grad.clone() for parameter in trained(model).values())]
        optimizer.step()
        model.eval()
        with torch.no_grad():
            seen.append(model(input_ids=ids).logits)
            seen.append(model.generate(ids[:, :4], max_new_tokens=3, do_sample=False, pad_token_id=0))
    return seen


STREAMED = [  # every pair of method, blocks that stay, place of the others and checkpointing
    ("pissa", 0, "host", True),
    ("pissa", LAYERS // 2, "disk", False),
    ("lora", LAYERS // 2, "host", False),
    ("lora", 0, "disk", True),
    ("edora", 0, "host", False),
    ("edora", LAYERS // 2, "disk", True),
]


@pytest.mark.parametrize(("method", "resident", "pages", "checkpointing"), STREAMED)
def test_streamed_training_is_resident_training_to_the_bit(out, method, resident, pages, checkpointing):
    expected = steps(load(out, Placement(), method), checkpointing=checkpointing)
    model = load(out, Placement(resident, pages), method)
    assert all(isinstance(slot, PinnedSlot if pages == "host" else RingSlot) for slot in slots_of(model))
    found = steps(model, checkpointing=checkpointing)
    assert all(map(torch.equal, found, expected))


def test_where_memory_cannot_be_pinned_a_ring_brings_the_same_bits(out, monkeypatch):
    real = page_buffers._is_registered
    monkeypatch.setattr(page_buffers, "_is_registered", lambda cpu, gpu: len(cpu) < 2 * 10**6 and real(cpu, gpu))
    expected = steps(load(out, Placement()), checkpointing=True)
    model = load(out, Placement(0, "host"))
    assert all(isinstance(slot, RingSlot) for slot in slots_of(model))
    assert all(map(torch.equal, steps(model, checkpointing=True), expected))


def test_memory_that_cuda_refuses_leaves_no_error_behind():
    refused = torch.empty(64, dtype=torch.uint8, device="cuda")  # memory of the device cannot be registered
    assert not page_buffers._is_registered(refused, refused.device)
    assert torch.ones(3, device="cuda").sum().item() == 3


def test_only_the_places_of_pages_are_on_the_device(out):
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    resident = load(out, Placement())
    all_of_it = torch.cuda.memory_allocated() - before
    del resident
    gc.collect()
    before = torch.cuda.memory_allocated()
    paged = load(out, Placement(0, "host"))
    cache = next(linear.paged.cache for _, linear in split_linears(paged) if linear.paged)
    less = all_of_it - (torch.cuda.memory_allocated() - before)
    residuals = sum(cache.store.sizes)
    assert less == pytest.approx(residuals - cache.num_bytes, rel=0.05)


def test_embeddings_on_the_host_train_to_the_same_bits(out):
    expected = steps(load(out, Placement()), checkpointing=True)
    model = load(out, Placement(embeddings_on_host=True))
    assert model.get_input_embeddings().weight.device.type == "cpu"
    assert all(map(torch.equal, steps(model, checkpointing=True), expected))


def test_a_model_that_goes_while_pages_arrive_leaves_memory_to_others_only_then(out):
    for _ in range(20):
        model = load(out, Placement(0, "host"))
        with torch.no_grad():
            model(input_ids=IDS.cuda())
        sizes = [len(slot.buffer) for slot in slots_of(model)]
        del model
        gc.collect()
        others = [torch.full((size,), 3, dtype=torch.uint8, device="cuda") for size in sizes]
        torch.cuda.synchronize()
        assert all(other.eq(3).all() for other in others)
