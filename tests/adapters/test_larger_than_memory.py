"""A base of twice the memory that the process may take trains and is measured, with pages from disk.

The limit is the kernel's (RLIMIT_DATA: writable private memory, which files that are mapped or read again are not), set
in a fork in which all libraries have worked once.
"""

import ctypes
import gc
import json
import os
import re
import resource
import sys
import threading
from pathlib import Path

import pytest
import torch

import qsvd
from qsvd.evaluate.perplexity import perplexity_of_documents
from qsvd.memory.items import Placement
from tests.peaks import MMAP_THRESHOLD, take_holes
from tests.stops import FORK

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's RLIMIT_DATA"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),  # Python 3.12
]

TOOLS = Path(__file__).parents[2] / "tools"
SHAPE = {"layers": 20, "hidden": 1024, "ffn": 1024, "heads": 16, "kv_heads": 8, "vocab": 512}
ALL = 20  # blocks
LARGE = 20_000  # bytes; memory of tensors above it is given back at once, and is no piece of what was freed before


def work(folder, resident):
    """Loss of a training step, and the perplexity after it, with so many blocks in memory."""
    ids = torch.arange(3, 19).reshape(1, 16)
    model = qsvd.load(folder, device="cpu", placement=Placement(resident, "disk")).train()
    model.activation_checkpointing_enable()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3).step()
    model.eval()
    return loss.item(), perplexity_of_documents(model, [ids[0].tolist()], window=16).perplexity


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A tiny one, and one of 63 MB, of as many blocks."""
    folder = tmp_path_factory.mktemp("bases")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TOOLS)
        import random_model
    for name, width in (("tiny", 64), ("large", SHAPE["hidden"])):
        config = random_model.llama_config({**SHAPE, "hidden": width, "ffn": width})
        config.dtype = torch.float32
        model = random_model.random_model(name, config, 0, torch.device("cpu"), layers_per_shard=10, files=None)
        random_model.write_split(model, qsvd.Quantize(name, out=folder / name, rank=2, device="cpu"))
    return folder / "tiny", folder / "large"


def limited(bases, limit, said):
    """Say what the work gives with no block in memory, and why it fails with all."""
    torch.set_num_threads(1)
    threading.stack_size(1 << 18)  # of threads that read: stacks count
    libc = ctypes.CDLL(None)
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(LARGE)  # so that qsvd leaves it
    libc.mallopt(MMAP_THRESHOLD, LARGE)
    work(bases[0], 0)
    gc.collect()
    libc.malloc_trim(0)
    take_holes(libc, LARGE)
    lines = Path("/proc/self/status").read_text().splitlines()
    taken = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (taken + limit, taken + limit))
    said.put(work(bases[1], 0))
    try:
        work(bases[1], ALL)
    except Exception as error:  # noqa: BLE001  # of torch, of Python, or of qsvd
        said.put(repr(error))


def test_a_base_of_twice_the_memory_trains_and_is_measured(bases):
    weights = json.loads((bases[1] / "qsvd.json").read_text())["weights"].values()
    stored = sum(rows * columns for rows, columns in (weight["shape"] for weight in weights)) // 2  # four bits each
    said = FORK.SimpleQueue()
    process = FORK.Process(target=limited, args=(bases, stored // 2, said))
    process.start()
    process.join(timeout=600)
    found = []
    while not said.empty():
        found.append(said.get())
    assert len(found) == 2, process.exitcode
    assert found[0] == work(bases[1], ALL)
    kinds = "allocate memory|start new thread|MemoryError|bad_alloc"  # threads that read have stacks
    assert re.search(kinds, found[1])
