"""Tables of bytes: every item of a plan in one row, and what is found counted by hand."""

import pytest
import torch

import qsvd
from qsvd.adapters.model import trained
from qsvd.adapters.start import new_record, planned_base
from qsvd.files.split_folder import open_split
from qsvd.memory.block_bytes import Batch
from qsvd.memory.items import Item, Limits, MemoryPlan, Placement
from qsvd.memory.training import Training, plan_training
from qsvd.training.steps import OUTSIDE, PEAK, PLANNED, REST, memory_by_item, planned_by_item
from tests.adapters.results import IDS, split_checkpoint

VOCABULARY, HIDDEN, LAYERS = 96, 64, 4


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return split_checkpoint(tmp_path_factory.mktemp("result"), num_hidden_layers=LAYERS)


def plan(out, device, placement):
    split = open_split(out)
    model = planned_base(split, new_record(split, qsvd.AdapterOptions()), torch.float32)
    return plan_training(model, Training(Batch(16, 2, False, True, device), 2, "adamw"), placement, Limits())


@pytest.mark.parametrize("libraries", [0, 1000])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_byte_of_a_plan_is_in_one_row(out, device, libraries):
    found = plan(out, device, Placement(1, "disk"))
    on_gpu = device == "cuda"
    rows = planned_by_item(found, on_gpu=on_gpu, libraries=libraries)
    there = {item.name: item.gpu if on_gpu else item.host for item in found.items}
    assert rows[PEAK] == sum(there.values()) - sum(there.get(name, 0) for name in OUTSIDE) + libraries
    assert rows[PEAK] == sum(size for name, size in rows.items() if name != PEAK)
    assert rows.get("libraries", 0) == libraries
    gone = {"activations of one block", "checkpoints of activations", "decode workspace", "loss", "optimizer step"}
    gone |= {"cuBLAS workspaces", "pages"}  # pages: on the host of a GPU they wait, on the disk of a CPU
    assert rows[REST] == sum(there.get(name, 0) for name in gone)
    assert rows[REST] > 0


def test_the_names_of_the_rows_are_those_of_the_plan(out):
    """An item that is renamed in the plan would quietly go to the rest."""
    names = {item.name for item in plan(out, "cuda", Placement(1, "host")).items}
    used = [part for parts in PLANNED.values() for part in parts] + list(OUTSIDE)
    assert len(used) == len(set(used))
    assert set(used) - names == {"frozen components", "experts in 16 bits"}  # which this model has not


def test_rows_add_up_the_items_of_one_place():
    items = (
        Item("residual codes", gpu=1, host=100),
        Item("residual scales", gpu=2),
        Item("page slots", gpu=4),
        Item("embeddings", host=200),
        Item("output head", gpu=8),
        Item("loss", gpu=16, disk=300),
        Item("CUDA context", gpu=32),
        Item("reserve", gpu=64, host=400),
    )
    made = MemoryPlan("train", items, Limits())
    zero = dict.fromkeys(PLANNED, 0)
    gpu = zero | {"residual": 7, "embeddings, norms, head": 8, REST: 16, PEAK: 31}
    assert planned_by_item(made, on_gpu=True, libraries=0) == gpu
    host = zero | {"residual": 100, "embeddings, norms, head": 200, "libraries": 50, REST: 0, PEAK: 350}
    assert planned_by_item(made, on_gpu=False, libraries=50) == host


def residual(alignment):
    """Bytes of the NF4 tensors of a block, each rounded up: codes, scales' codes, their scales, offset and levels."""
    matrices = [64 * 64, 64 * 64, 32 * 64, 32 * 64, 128 * 64, 128 * 64, 64 * 128]
    tensors = [size for n in matrices for size in (n // 2, n // 64, 4 * -(-n // (64 * 256)), 4, 4 * 256)]
    return sum(-(-size // alignment) * alignment for size in tensors)


@pytest.mark.parametrize(("method", "resident"), [("pissa", 0), ("lora", 1), ("edora", LAYERS)])
def test_found_bytes_are_those_of_the_shapes(out, method, resident):
    options = qsvd.AdapterOptions(method, dtype="float32")
    model = qsvd.load(out, options=options, device="cpu", placement=Placement(resident, "disk")).train()
    optimizer = torch.optim.AdamW(trained(model).values())
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    found = memory_by_item(model, optimizer, 10**9, 10**6)
    parameters = list(trained(model).values())
    adapters = 4 * sum(p.numel() for p in parameters)
    assert found["trained parameters"] == found["gradients"] == adapters
    assert found["optimizer state"] == 2 * adapters + 4 * len(parameters)  # two moments, and a number of steps
    norms, rotary = HIDDEN * (2 * LAYERS + 1), 2 * 8  # frequencies of heads 16 wide, and the ones they began as
    assert found["embeddings, norms, head"] == 4 * (2 * VOCABULARY * HIDDEN + norms + rotary)
    staying, visiting = resident * residual(1), min(3, LAYERS - resident) * residual(256)
    assert found["residual"] == staying + visiting
    assert found["libraries"] == 10**6
    assert sum(size for name, size in found.items() if name != PEAK) == found[PEAK] == 10**9
