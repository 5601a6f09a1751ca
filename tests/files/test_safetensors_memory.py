"""Resident memory of reading and copying, measured in a process of its own."""

import subprocess
import sys

import pytest
import safetensors.torch
import torch

MEASURE = """
import resource, sys, torch
from pathlib import Path
from qsvd.files.safetensors import NewTensor, read_header, read_tensor, write_stream
entry = read_header(Path(sys.argv[1])).tensors["a"]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
if sys.argv[2] == "copy":
    write_stream(Path(sys.argv[1] + ".copy"), [NewTensor("a", entry.dtype, entry.shape, entry)], {})
else:
    read_tensor(entry)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("action", "tensors_in_memory"), [("copy", 0), ("read", 1)])
def test_resident_memory_is_one_tensor_to_read_and_a_chunk_to_copy(tmp_path, action, tensors_in_memory):
    num_bytes = 96 * 2**20
    slack = 24 * 2**20  # the 8 MiB chunk, and what the allocator keeps
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"a": torch.ones(num_bytes // 4)}, path)
    command = [sys.executable, "-c", MEASURE, str(path), action]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert grown <= tensors_in_memory * num_bytes + slack
