"""Devices by name, on a machine that has two GPUs by its own account: no GPU is needed."""

import pytest
import torch

from qsvd.memory.device import device_of


@pytest.fixture
def current(monkeypatch):
    """The indices that became the current GPU."""
    chosen = [1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: chosen[-1])
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


@pytest.mark.parametrize(("name", "index"), [("auto", 1), ("cuda", 1), ("cuda:0", 0), ("cuda:1", 1)])
def test_a_gpu_has_an_index_and_becomes_the_current_one(current, name, index):
    assert device_of(name) == torch.device("cuda", index)
    assert current[-1] == index


@pytest.mark.usefixtures("current")
def test_a_limit_of_memory_can_be_set_for_every_name(monkeypatch):
    monkeypatch.setattr(torch._C, "_cuda_setMemoryFraction", lambda *_: None, raising=False)
    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    with pytest.raises(ValueError, match="specified index"):
        torch.cuda.set_per_process_memory_fraction(0.5, torch.device("cuda"))
    for name in ("auto", "cuda", "cuda:1"):
        torch.cuda.set_per_process_memory_fraction(0.5, device_of(name))


def test_a_gpu_beyond_the_last_is_refused(current):
    with pytest.raises(ValueError, match="'cuda:2' does not exist: torch finds 2 CUDA GPUs"):
        device_of("cuda:2")
    assert current == [1]


def test_a_cpu_has_no_index():
    assert device_of("cpu") == device_of("cpu:0") == torch.device("cpu")
