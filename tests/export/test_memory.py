"""Resident memory of a merge, measured in a process of its own."""

import os
import subprocess
import sys

import pytest

import qsvd
from tests.checkpoints import write_checkpoint
from tests.commands.folders import python_path

MEASURE = """
import resource, sys, torch, transformers
from pathlib import Path
from qsvd.export.trained import Trained, TrainedModel
from qsvd.export.merged import MergedForm, write_merged
from qsvd.files.split_folder import open_split

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def read(name):
    rows, columns = split.weights[name]["shape"]
    return Trained(torch.ones(rows, 4), torch.ones(4, columns))

split = open_split(Path(sys.argv[1]))
transformers.AutoConfig.from_pretrained(split.folder)
torch.ones(64, 64).addmm_(torch.ones(64, 4), torch.ones(4, 64))
before = peak()
write_merged(TrainedModel(split, read), Path(sys.argv[2]), MergedForm())
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_is_one_weight_and_its_dense_form(tmp_path):
    sides = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 3}
    write_checkpoint(tmp_path / "source", **sides)
    qsvd.quantize(qsvd.Quantize(str(tmp_path / "source"), out=tmp_path / "out", rank=0, include=("*.1.mlp.up_proj",)))
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "out"), str(tmp_path / "x")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    one_weight = 1024 * 4096 * (4 + 2 + 0.5 + 1 / 16)  # float32, bfloat16, codes, float32 scales
    slack = 24 * 2**20  # what the allocator keeps, and chunks of files
    written = (tmp_path / "x" / "model.safetensors").stat().st_size
    assert one_weight + slack < written / 1.5, "the whole model would pass"
    assert int(done.stdout) <= one_weight + slack
