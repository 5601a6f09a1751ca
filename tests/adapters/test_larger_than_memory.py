"""A base of twice the memory that the process may take trains and is measured, with pages from disk.

The limit is the kernel's (RLIMIT_DATA: writable private memory, which files that are mapped or read again are not), set
when all libraries are loaded and have worked once.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.adapters.results import split_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's RLIMIT_DATA")]

MAKE_MODEL = Path(__file__).parents[2] / "tools" / "make_model"
SHAPE = ["--layers=32", "--hidden=1024", "--ffn=2816", "--heads=16", "--kv-heads=8", "--vocab=512", "--rank=2"]
SCRIPT = """
import resource, sys
import torch
import qsvd
from qsvd.evaluate.perplexity import perplexity_of_documents
from qsvd.memory.items import Placement

torch.set_num_threads(1)
warm_up, base, resident, limit = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
ids = torch.arange(3, 35).reshape(1, 32)

def work(folder, placement):
    model = qsvd.load(folder, device="cpu", placement=placement).train()
    model.activation_checkpointing_enable()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3).step()
    model.eval()
    return loss.item(), perplexity_of_documents(model, [ids[0].tolist()], window=32).perplexity

work(warm_up, Placement(0, "disk"))
if limit:
    taken = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (taken + limit, taken + limit))
print(*work(base, Placement(resident, "disk")))
"""


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A tiny one, and one of 180 MB."""
    folder = tmp_path_factory.mktemp("bases")
    command = [sys.executable, MAKE_MODEL, folder / "large", "--as=split", "--device=cpu", "--dtype=float32", *SHAPE]
    subprocess.run(command, check=True, capture_output=True)
    return split_checkpoint(folder / "tiny", num_hidden_layers=4), folder / "large"


def child(bases, resident, limit):
    at_once = {"MALLOC_MMAP_THRESHOLD_": "100000", "MALLOC_TRIM_THRESHOLD_": "100000"}  # give memory back
    environment = os.environ | at_once | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, *map(str, (*bases, resident, limit))]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_a_base_of_twice_the_memory_trains_and_is_measured(bases):
    weights = json.loads((bases[1] / "qsvd.json").read_text())["weights"].values()
    stored = sum(rows * columns for rows, columns in (weight["shape"] for weight in weights)) // 2  # four bits each
    refused = child(bases, 32, stored // 2)
    assert refused.returncode != 0
    assert "can't allocate memory" in refused.stderr
    paged, unlimited = child(bases, 0, stored // 2), child(bases, 32, 0)
    assert paged.returncode == 0, paged.stderr
    assert paged.stdout == unlimited.stdout
