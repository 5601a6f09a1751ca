"""Tensors that are made when their turn comes to be written."""

import gc
import weakref

import pytest
import safetensors.torch
import torch

from qsvd.files.safetensors import NewTensor, write_stream


def test_values_are_made_one_tensor_at_a_time(tmp_path):
    alive = weakref.WeakSet()
    most = []

    def make(number):
        values = torch.full((4, 5), float(number)).mT
        alive.add(values)
        gc.collect()
        most.append(len(alive))
        return values

    new = [NewTensor(f"t{n}", "F32", (5, 4), lambda n=n: make(n)) for n in range(4)]
    write_stream(tmp_path / "x.safetensors", new, {})
    assert most == [1, 1, 1, 1]
    written = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(written[f"t{n}"], torch.full((5, 4), float(n))) for n in range(4))


@pytest.mark.parametrize("made", [torch.ones(3, 2), torch.ones(2, 3).half()])
def test_made_values_of_another_dtype_or_shape_are_refused_and_leave_nothing(tmp_path, made):
    new = [NewTensor("a", "F32", (2, 3), lambda: made)]
    with pytest.raises(ValueError, match=r"a is stated as F32 \[2, 3\], but its source is F"):
        write_stream(tmp_path / "x.safetensors", new, {})
    assert not list(tmp_path.iterdir())
