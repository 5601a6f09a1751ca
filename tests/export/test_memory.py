"""Resident memory of a merge, measured in a process of its own."""

import os
import subprocess
import sys

import pytest

import qsvd
from tests.checkpoints import write_checkpoint
from tests.commands.folders import python_path

MEASURE = """
import sys, torch
from pathlib import Path
from qsvd.export.trained import Trained, TrainedModel
from qsvd.export.merged import MergedForm, write_merged
from qsvd.files.split_folder import open_split

def peak():  # of this program alone; ru_maxrss begins with the memory of the process that started it
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

def merge(base, out):
    split = open_split(Path(base))

    def read(name):
        rows, columns = split.weights[name]["shape"]
        return Trained(torch.ones(rows, 4), torch.ones(4, columns))

    write_merged(TrainedModel(split, read), Path(out), MergedForm())

merge(sys.argv[1], sys.argv[2] + "-tiny")  # imports and first calls of libraries
before = peak()
merge(sys.argv[3], sys.argv[2])
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_is_one_weight_and_its_dense_form(tmp_path):
    sides = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 3}
    write_checkpoint(tmp_path / "source", **sides)
    qsvd.quantize(qsvd.Quantize(str(tmp_path / "source"), out=tmp_path / "out", rank=0, include=("*.1.mlp.up_proj",)))
    write_checkpoint(tmp_path / "tiny-source")
    qsvd.quantize(qsvd.Quantize(str(tmp_path / "tiny-source"), out=tmp_path / "tiny", rank=0))
    command = [sys.executable, "-c", MEASURE, *(str(tmp_path / name) for name in ("tiny", "x", "out"))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    one_weight = 1024 * 4096 * (4 + 2 + 0.5 + 1 / 16)  # float32, bfloat16, codes, float32 scales
    slack = 24 * 2**20  # what the allocator keeps, and chunks of files
    written = (tmp_path / "x" / "model.safetensors").stat().st_size
    assert one_weight + slack < written / 1.5, "the whole model would pass"
    assert one_weight / 4 < int(done.stdout) <= one_weight + slack
