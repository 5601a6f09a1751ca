"""Tensors that threads read ahead, against the safetensors library."""

import threading
import time

import pytest
import safetensors.torch
import torch

from qsvd.errors import BadInput
from qsvd.files import readers as files
from qsvd.files.readers import ReadAhead
from qsvd.files.safetensors import new_tensors, read_header, read_tensor, write_stream

COUNT = 40


@pytest.fixture
def entries(tmp_path):
    draw = torch.Generator().manual_seed(0)
    tensors = {f"{n:02}": torch.randn(n % 7, 16, generator=draw) for n in range(COUNT)}  # some are empty
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    return tensors, list(read_header(tmp_path / "a.safetensors").tensors.values())


@pytest.mark.parametrize("asked", ["in order", "backwards", "twice", "not in the list"])
def test_tensors_are_those_of_the_file_in_whatever_order_they_are_asked_for(entries, monkeypatch, asked):
    tensors, found = entries
    monkeypatch.setattr(files, "AHEAD", 1000)
    order = {"backwards": found[::-1], "twice": found + found}.get(asked, found)
    with ReadAhead([] if asked == "not in the list" else found) as read:
        for entry in order:
            assert torch.equal(read(entry), tensors[entry.name])


def test_no_more_is_read_ahead_than_was_said_and_several_are_read_at_a_time(entries, monkeypatch):
    _, found = entries
    started, used, lock, most = [], [], threading.Lock(), 3 * max(entry.num_bytes for entry in found)
    together = threading.Barrier(2, timeout=10)  # two reads wait for each other

    def noted(entry, *, pinned):
        assert threading.current_thread() is not threading.main_thread(), "each is read before it is asked for"
        with lock:
            started.append(entry.num_bytes)
            assert sum(started) - sum(used) <= most
            number = len(started)
        if number <= 2:
            together.wait()
        return read_tensor(entry, pinned=pinned)

    monkeypatch.setattr(files, "AHEAD", most)
    monkeypatch.setattr(files, "read_tensor", noted)
    with ReadAhead(found) as read:
        for number, entry in enumerate(found, start=1):
            with lock:
                used.append(entry.num_bytes)
            read(entry)
            until = time.monotonic() + 10
            while len(started) < min(number + 3, COUNT):  # as many of the largest as are read ahead
                assert time.monotonic() < until, "reading stays ahead"
                time.sleep(0.001)
    assert len(started) == COUNT


def test_a_fault_is_raised_where_its_tensor_is_used_and_leaving_early_waits_for_nothing(entries):
    tensors, found = entries
    path = found[0].file.with_name("ours.safetensors")
    write_stream(path, new_tensors(tensors), {})
    found = list(read_header(path).tensors.values())
    with path.open("rb+") as file:
        file.truncate(found[-1].start + 1)
    with ReadAhead(found) as read:
        for entry in found[:-1]:
            read(entry)
        with pytest.raises(BadInput, match="ends inside"):
            read(found[-1])
    with ReadAhead(found) as read:
        read(found[0])
