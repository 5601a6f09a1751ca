"""A base of twice the memory that the process may take trains and is measured, with pages from disk.

The limit is the kernel's (RLIMIT_DATA: writable private memory, which files that are mapped or read again are not), set
when all libraries are loaded and have worked once.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qsvd
from qsvd.evaluate.perplexity import perplexity_of_documents
from qsvd.memory.items import Placement
from tests.adapters.results import split_checkpoint
from tests.commands.folders import python_path

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's RLIMIT_DATA")]

TOOLS = Path(__file__).parents[2] / "tools"
SHAPE = {"layers": 20, "hidden": 1024, "ffn": 2816, "heads": 16, "kv_heads": 8, "vocab": 512}
ALL = 20  # blocks
SCRIPT = """
import resource, sys
import torch
from tests.adapters.test_larger_than_memory import ALL, work

torch.set_num_threads(1)
warm_up, base, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
work(warm_up, 0)
taken = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (taken + limit, taken + limit))
print(*work(base, 0), flush=True)
work(base, ALL)
print("all blocks fit in the limit")
"""


def work(folder, resident):
    """Loss of a training step, and the perplexity after it, with so many blocks in memory."""
    ids = torch.arange(3, 35).reshape(1, 32)
    model = qsvd.load(folder, device="cpu", placement=Placement(resident, "disk")).train()
    model.activation_checkpointing_enable()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3).step()
    model.eval()
    return loss.item(), perplexity_of_documents(model, [ids[0].tolist()], window=32).perplexity


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A tiny one, and one of 110 MB."""
    folder = tmp_path_factory.mktemp("bases")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TOOLS)
        import random_model
    config = random_model.llama_config(SHAPE)
    config.dtype = torch.float32
    model = random_model.random_model("large", config, 0, torch.device("cpu"), layers_per_shard=4, files=None)
    random_model.write_split(model, qsvd.Quantize("large", out=folder / "large", rank=2, device="cpu"))
    return split_checkpoint(folder / "tiny", num_hidden_layers=4), folder / "large"


def test_a_base_of_twice_the_memory_trains_and_is_measured(bases):
    weights = json.loads((bases[1] / "qsvd.json").read_text())["weights"].values()
    stored = sum(rows * columns for rows, columns in (weight["shape"] for weight in weights)) // 2  # four bits each
    at_once = {"MALLOC_MMAP_THRESHOLD_": "100000", "MALLOC_TRIM_THRESHOLD_": "100000"}  # give memory back
    environment = os.environ | at_once | {"OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()}
    command = [sys.executable, "-c", SCRIPT, *map(str, (*bases, stored // 2))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [str(number) for number in work(bases[1], ALL)], done.stderr
    assert done.returncode != 0
    kinds = "allocate memory|start new thread|MemoryError|bad_alloc"  # threads that read have stacks
    assert re.search(kinds, done.stderr)
