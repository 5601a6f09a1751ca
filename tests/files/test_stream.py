"""Reading ahead by one stack, in order, and no further."""

import threading

import pytest
import torch

from qsvd.files.readers import stream
from qsvd.files.source import open_checkpoint
from qsvd.plan.weights import WeightSpec
from tests.checkpoints import write_checkpoint


class CountedCheckpoint:
    """Stands for a Checkpoint: notes what was read, and by which thread."""

    def __init__(self):
        self.begun = []
        self.threads = set()
        self.event = threading.Event()

    def read_weight(self, name):
        self.begun.append(name)
        self.threads.add(threading.get_ident())
        self.event.set()
        if name == "bad":
            raise ValueError("bad is truncated")
        return torch.tensor([float(name)])


def wait_until_begun(checkpoint, count):
    while len(checkpoint.begun) < count:
        assert checkpoint.event.wait(timeout=600)
        checkpoint.event.clear()


def test_the_tensors_of_a_checkpoint_come_in_the_order_asked_for(tmp_path):
    model = write_checkpoint(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    names = sorted(checkpoint.tensors, key=lambda name: name[::-1])
    state = model.state_dict()
    weights = [WeightSpec(name, name, checkpoint.tensors[name].shape, "other", 0) for name in names]
    stacks = [weights[:1], weights[1:6], weights[6:]]
    found = [tensor for tensors in stream(checkpoint, stacks) for tensor in tensors]
    assert all(torch.equal(tensor, state[name]) for name, tensor in zip(names, found, strict=True))


def test_the_next_stack_is_read_while_this_one_is_worked_on_and_no_more():
    checkpoint = CountedCheckpoint()
    tensors = stream(checkpoint, ["0", "12", "345", "6"])
    assert checkpoint.begun == []
    assert torch.cat(next(tensors)).tolist() == [0]
    wait_until_begun(checkpoint, 3)
    assert sorted(checkpoint.begun) == ["0", "1", "2"]
    assert torch.cat(next(tensors)).tolist() == [1, 2]
    wait_until_begun(checkpoint, 6)
    assert sorted(checkpoint.begun) == ["0", "1", "2", "3", "4", "5"]
    assert threading.get_ident() not in checkpoint.threads
    tensors.close()
    assert "6" not in checkpoint.begun


def test_the_weights_of_a_stack_are_read_at_the_same_time():
    checkpoint, both = CountedCheckpoint(), threading.Barrier(2, timeout=600)
    read = checkpoint.read_weight
    checkpoint.read_weight = lambda name: (both.wait(), read(name))[1]
    assert torch.cat(next(stream(checkpoint, ["01"]))).tolist() == [0, 1]


def test_an_error_of_reading_comes_when_its_tensor_is_asked_for():
    tensors = stream(CountedCheckpoint(), [["0"], ["bad"], ["2"]])
    assert torch.cat(next(tensors)).tolist() == [0]
    with pytest.raises(ValueError, match="bad is truncated"):
        next(tensors)


@pytest.mark.parametrize("names", [[], ["7"]])
def test_few_names(names):
    found = [tensor.item() for (tensor,) in stream(CountedCheckpoint(), names)]
    assert found == [float(name) for name in names]
