"""Checkpoints that have pytorch_model.bin only, written by torch."""

import json

import pytest
import safetensors.torch
import torch

from qsvd.files.source import open_checkpoint
from tests.checkpoints import write_checkpoint


def write_pickled(folder, **options):
    """The same tensors as pytorch_model.bin."""
    state = write_checkpoint(folder, **options).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    return state


def test_pickled_weights_are_read_when_there_are_no_others(tmp_path):
    state = write_pickled(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.tensors.keys() == state.keys()
    for name, tensor in state.items():
        entry = checkpoint.tensors[name]
        described = (entry.dtype, entry.shape, entry.num_bytes)
        assert described == ("BF16", tuple(tensor.shape), 2 * tensor.numel())
        assert torch.equal(checkpoint.read(name), tensor)
    safetensors.torch.save_file({"only": torch.ones(1)}, tmp_path / "model.safetensors")
    assert set(open_checkpoint(str(tmp_path)).tensors) == {"only"}


def test_a_pickled_tensor_is_contiguous_and_its_own(tmp_path):
    write_pickled(tmp_path)
    torch.save({"a": torch.arange(6.0).reshape(2, 3).T}, tmp_path / "pytorch_model.bin")
    checkpoint = open_checkpoint(str(tmp_path))
    values = checkpoint.read("a")
    assert values.is_contiguous()
    values.zero_()
    assert checkpoint.read("a").sum() == 15


def test_pickled_shards_are_read_by_their_index(tmp_path):
    state = write_pickled(tmp_path)
    halves = {"pytorch_model-1.bin": {}, "pytorch_model-2.bin": {}}
    for i, name in enumerate(state):
        halves[f"pytorch_model-{1 + i % 2}.bin"][name] = state[name]
    for file, half in halves.items():
        torch.save(half, tmp_path / file)
    (tmp_path / "pytorch_model.bin").unlink()
    weight_map = {name: file for file, half in halves.items() for name in half}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.tensors.keys() == state.keys()
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"junk", r"pytorch_model\.bin is truncated or not a PyTorch file that weights_only can map"),
        ([torch.ones(1)], "holds a list, not tensors by name"),
        ({"model": {"a": torch.ones(1)}}, "model is not a dense tensor; save"),
    ],
)
def test_pickled_files_of_another_kind_are_refused(tmp_path, content, message):
    write_pickled(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(str(tmp_path))
