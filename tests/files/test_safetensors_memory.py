"""Resident memory of reading and copying, measured in a process of its own."""

import pytest
import safetensors.torch
import torch

from qsvd.files.safetensors import NewTensor, read_header, read_tensor, write_stream
from tests.peaks import grown


@pytest.mark.slow
def test_resident_memory_is_one_tensor_to_read_and_a_chunk_to_copy(tmp_path):
    num_bytes = 96 * 2**20
    slack = 24 * 2**20  # the 8 MiB chunk, and what the allocator keeps
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"a": torch.ones(num_bytes // 4)}, path)

    def work():
        entry = read_header(path).tensors["a"]
        yield
        write_stream(tmp_path / "copy.safetensors", [NewTensor("a", entry.dtype, entry.shape, entry)], {})
        yield
        read_tensor(entry)
        yield

    copied, read = grown(work, tmp_path)
    assert copied <= slack
    assert num_bytes // 2 < read <= num_bytes + slack
