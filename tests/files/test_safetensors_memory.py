"""Resident memory of reading and copying, measured in a process of its own."""

import subprocess
import sys

import pytest
import safetensors.torch
import torch

MEASURE = """
import sys, torch
from pathlib import Path
from qsvd.files.safetensors import NewTensor, read_header, read_tensor, write_stream
entry = read_header(Path(sys.argv[1])).tensors["a"]

def peak():  # of this program alone; ru_maxrss begins with the memory of the process that started it
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

before = peak()
write_stream(Path(sys.argv[1] + ".copy"), [NewTensor("a", entry.dtype, entry.shape, entry)], {})
copied = peak()
read_tensor(entry)
print(copied - before, peak() - before)
"""


@pytest.mark.slow
def test_resident_memory_is_one_tensor_to_read_and_a_chunk_to_copy(tmp_path):
    num_bytes = 96 * 2**20
    slack = 24 * 2**20  # the 8 MiB chunk, and what the allocator keeps
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"a": torch.ones(num_bytes // 4)}, path)
    command = [sys.executable, "-c", MEASURE, str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    copied, read = map(int, done.stdout.split())
    assert copied <= slack
    assert num_bytes // 2 < read <= num_bytes + slack
