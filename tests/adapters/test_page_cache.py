"""Residuals in pages: the same bits as resident ones, whatever the order in which the pages are asked for."""

import copy
import itertools
import os
import random
import shutil

import pytest
import torch

import qsvd
from qsvd.adapters.model import split_linears, trained
from qsvd.adapters.pages import cache as paging
from qsvd.adapters.pages.buffers import Arena, HostStore, Store
from qsvd.adapters.pages.cache import PageCache, next_pages
from qsvd.files.readers import PageReader
from qsvd.files.safetensors import NewTensor, read_header, write_stream
from qsvd.memory.items import Placement
from tests.adapters.results import IDS, split_checkpoint

CPU = torch.device("cpu")
LAYERS = 5
METHODS = ("pissa", "edora")


class CountedStore(Store):
    """Pages that are their own number, in every byte; `read` lists them in the order in which they were asked for."""

    def __init__(self, count):
        self.sizes = [8 + number for number in range(count)]
        self.read = []

    def read_into(self, page, out):
        self.read.append(page)
        out[: self.sizes[page]] = page


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return split_checkpoint(tmp_path_factory.mktemp("result"), num_hidden_layers=LAYERS, shard_size="100KB")


def load(out, resident, pages, method="pissa", **more):
    options = qsvd.AdapterOptions(method, seed=3)
    return qsvd.load(out, options=options, device="cpu", placement=Placement(resident, pages, **more))


def cache_of(model):
    return next(linear.paged.cache for _, linear in split_linears(model) if linear.paged)


def gradients(model):
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in trained(model).values())]


def assert_equal(left, right):
    assert len(left) == len(right)
    assert all(map(torch.equal, left, right))


@pytest.fixture(scope="module")
def of_resident_models(out):
    """What training, eval and generation with all blocks in memory give: method -> tensors."""
    return {method: trained_and_asked(load(out, None, "host", method)) for method in METHODS}


def trained_and_asked(model):
    """Losses, gradients, logits and tokens of two steps."""
    optimizer, seen = torch.optim.AdamW(trained(model).values(), lr=1e-2), []
    for _ in range(2):
        model.train()
        seen += gradients(model)
        optimizer.step()
        model.eval()
        with torch.no_grad():
            seen.append(model(input_ids=IDS).logits)
            seen.append(model.generate(IDS[:, :4], max_new_tokens=3, do_sample=False, pad_token_id=0))
    return seen


@pytest.mark.parametrize(
    ("method", "checkpointing", "resident", "pages"),
    [
        ("edora", False, 0, "disk"),
        ("pissa", True, 1, "host"),
    ],
)
def test_training_eval_and_generation_give_the_bits_of_a_resident_model(
    out, of_resident_models, method, checkpointing, resident, pages
):
    model = load(out, resident, pages, method)
    if checkpointing:
        model.activation_checkpointing_enable()
    assert_equal(trained_and_asked(model), of_resident_models[method])


def test_no_more_than_three_pages_are_in_memory(out):
    model = load(out, 1, "disk")
    buffers = {id(linear): sum(b.nbytes for b in linear.buffers()) for _, linear in split_linears(model)}
    held = [linear for _, linear in split_linears(model) if buffers[id(linear)]]
    assert len(held) == 7  # of the one resident block
    cache = cache_of(model)
    assert len(cache.store.sizes) == LAYERS - 1
    assert cache.num_bytes == 3 * max(cache.store.sizes)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_moves_every_page_twice_but_those_that_are_there_where_it_turns_round(out, checkpointing):
    model = load(out, 0, "disk").train()
    if checkpointing:
        model.activation_checkpointing_enable()
    cache = cache_of(model)
    for step in range(3):
        before = cache.moved_bytes
        gradients(model)
        moved = (cache.moved_bytes - before) / cache.store.sizes[0]
        assert moved == (2 * LAYERS - 3 if step == 0 else 2 * (LAYERS - 3)), step


def test_layer_major_moves_the_pages_of_a_step_once_for_all_its_batches(out):
    model = load(out, 0, "disk").train()
    model.micro_batch = 1
    model.activation_checkpointing_enable()
    cache = cache_of(model)
    gradients(model)
    before = cache.moved_bytes
    gradients(model)  # two rows, one at a time
    assert cache.moved_bytes - before == 2 * (LAYERS - 3) * cache.store.sizes[0]


def test_evaluation_begins_again_at_the_first_page(out):
    model = load(out, 0, "disk")
    cache = cache_of(model)
    with torch.no_grad():
        for _ in range(2):
            model(input_ids=IDS)
        before = cache.moved_bytes
        model(input_ids=IDS)
    assert cache.moved_bytes - before == LAYERS * cache.store.sizes[0]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_in_any_order_the_bytes_are_the_right_ones(count):
    store = CountedStore(count)
    cache = PageCache(store, CPU)
    draws = random.Random(count)
    for _ in range(300):
        page, backward_follows = draws.randrange(count), draws.random() < 0.5
        for _ in range(draws.randint(1, 3)):
            found = cache.get(page, backward_follows=backward_follows)
            assert found[: store.sizes[page]].eq(page).all()
    assert cache.num_bytes == min(3, count) * max(store.sizes)


@pytest.mark.parametrize(
    ("page", "ascending", "backward_follows", "expected"),
    [
        (2, True, True, [3, 4]),
        (2, False, True, [1, 0]),
        (4, True, True, [5, 3]),  # the last page computes forward and backward, and is there
        (5, True, True, [4, 3]),
        (1, False, True, [0, 2]),
        (0, False, True, [1, 2]),
        (4, True, False, [5, 0]),
        (5, True, False, [0, 1]),
        (0, True, False, [1, 2]),
    ],
)
def test_the_next_pages_go_on_and_turn_round_only_where_a_backward_pass_follows(
    page, ascending, backward_follows, expected
):
    assert next_pages(page, ascending, 6, 2, backward_follows=backward_follows) == expected


@pytest.mark.parametrize("backward_follows", [True, False])
@pytest.mark.parametrize("count", range(1, 6))
def test_the_next_pages_are_others_and_no_more_than_there_are(count, backward_follows):
    for page, ascending, capacity in itertools.product(range(count), (True, False), range(8)):
        found = next_pages(page, ascending, count, capacity, backward_follows=backward_follows)
        assert len(set(found) - {page}) == len(found) == min(capacity, count - 1)
        assert set(found) <= set(range(count))


@pytest.mark.parametrize("backward_follows", [True, False])
def test_what_comes_next_is_fetched_before_it_is_asked_for(backward_follows):
    store = CountedStore(6)
    cache = PageCache(store, CPU)
    upwards, downwards = range(6), range(5, -1, -1)
    for page in itertools.chain(upwards, downwards if backward_follows else upwards, upwards):
        held = {slot.page for slot in cache._slots}
        assert page in held or not store.read, "the first page alone is waited for"
        cache.get(page, backward_follows=backward_follows)


def test_a_reference_model_shares_the_pages(out):
    model = load(out, 0, "host")
    reference = model.reference()
    assert cache_of(reference) is cache_of(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        assert_equal([reference(input_ids=IDS).logits, copied(input_ids=IDS).logits], [model(input_ids=IDS).logits] * 2)


def test_shards_that_are_deleted_meanwhile_are_still_read(out, tmp_path):
    out = shutil.copytree(out, tmp_path / "out")
    model = load(out, 0, "disk").train()
    before = gradients(model)
    for shard in out.glob("*.safetensors"):
        shard.unlink()
    assert_equal(gradients(model), before)


def test_a_shard_that_is_cut_off_meanwhile_is_an_error_that_names_it(tmp_path):
    out = split_checkpoint(tmp_path, num_hidden_layers=5)
    model = load(out, 0, "disk").train()
    gradients(model)
    shard = out / "model.safetensors"
    os.truncate(shard, 4096)
    with pytest.raises(OSError, match="was truncated during the run and ends inside model") as raised:
        gradients(model)
    assert raised.value.filename == str(shard)


def test_an_arena_that_the_host_cannot_hold_is_refused_before_it_is_filled(out, monkeypatch):
    monkeypatch.setattr(paging, "free_host_memory", lambda: 1000)
    monkeypatch.setattr(PageReader, "read_into", None)
    with pytest.raises(ValueError, match=r"take 0.00 GB of CPU memory, and 0.00 GB are free; keep more blocks"):
        load(out, 0, "host")


def test_tensors_lie_in_a_page_one_after_the_other_each_at_a_multiple_of_256_bytes(out):
    pages = {}
    for _, linear in split_linears(load(out, 1, "disk")):
        if linear.paged:
            pages.setdefault(linear.paged.page, []).extend(linear.paged.places.values())
            size = linear.paged.cache.store.sizes[linear.paged.page]
            assert max(start + num_bytes for start, num_bytes in linear.paged.places.values()) <= size
    assert len(pages) == LAYERS - 1
    for places in pages.values():
        assert all(start % 256 == 0 for start, _ in places)
        ordered = sorted(places)
        assert all(start + num_bytes <= later for (start, num_bytes), (later, _) in itertools.pairwise(ordered))


def test_more_blocks_than_there_are_cannot_stay(out):
    with pytest.raises(ValueError, match=f"{LAYERS + 1} resident blocks are outside 0..{LAYERS}"):
        load(out, LAYERS + 1, "disk")


def test_an_arena_of_more_than_all_memory_is_refused():
    with pytest.raises(MemoryError, match="in one piece"):
        Arena(2**53, CPU)


def test_the_arena_holds_the_pages_one_after_the_other(tmp_path):
    values = torch.arange(100, dtype=torch.uint8)
    write_stream(tmp_path / "x.safetensors", [NewTensor("x", "U8", (100,), values)], {})
    entry = read_header(tmp_path / "x.safetensors").tensors["x"]
    store = HostStore(PageReader([{0: b"ab", 2: entry}, {5: b"c"}]), [102, 6], CPU)
    assert bytes(store.view(0).numpy()) == b"ab" + bytes(range(100))
    assert bytes(store.view(1).numpy())[5:] == b"c"
    assert not store.pinned
    out = torch.zeros(200, dtype=torch.uint8)
    store.read_into(0, out)
    assert torch.equal(out[:102], store.view(0))
    assert not out[102:].any()


def test_tokens_looked_up_on_the_host_give_the_same_bits_and_stay_there_when_the_model_moves(out):
    plain, hosted = load(out, None, "host"), load(out, None, "host", embeddings_on_host=True)
    assert_equal(gradients(plain.train()), gradients(hosted.train()))
    names = {name for name, _ in plain.named_parameters()} - {name for name, _ in hosted.named_parameters()}
    assert names == {"model.embed_tokens.weight"}
    hosted.to("meta")
    assert hosted.device == torch.device("meta"), "where generate and trainers send tokens"
    assert hosted.get_input_embeddings().weight.device == CPU
    assert torch.equal(hosted.get_input_embeddings().weight, plain.get_input_embeddings().weight)


def test_an_embedding_that_is_the_head_too_cannot_stay_on_the_host(tmp_path):
    out = split_checkpoint(tmp_path, tie_word_embeddings=True)
    with pytest.raises(ValueError, match="the embedding of LlamaForCausalLM is also its output head"):
        load(out, None, "host", embeddings_on_host=True)
