"""Reading ahead by one, in order, and no further."""

import threading

import pytest
import torch

from qsvd.files.source import open_checkpoint, stream
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
    for name, tensor in zip(names, stream(checkpoint, weights), strict=True):
        assert torch.equal(tensor, state[name])


def test_the_next_tensor_is_read_while_this_one_is_worked_on_and_no_more():
    checkpoint = CountedCheckpoint()
    tensors = stream(checkpoint, ["0", "1", "2", "3"])
    assert checkpoint.begun == []
    assert next(tensors).item() == 0
    wait_until_begun(checkpoint, 2)
    assert checkpoint.begun == ["0", "1"]
    assert next(tensors).item() == 1
    wait_until_begun(checkpoint, 3)
    assert checkpoint.begun == ["0", "1", "2"]
    assert threading.get_ident() not in checkpoint.threads
    tensors.close()
    assert "3" not in checkpoint.begun


def test_an_error_of_reading_comes_when_its_tensor_is_asked_for():
    tensors = stream(CountedCheckpoint(), ["0", "bad", "2"])
    assert next(tensors).item() == 0
    with pytest.raises(ValueError, match="bad is truncated"):
        next(tensors)


@pytest.mark.parametrize("names", [[], ["7"]])
def test_few_names(names):
    assert [tensor.item() for tensor in stream(CountedCheckpoint(), names)] == [float(name) for name in names]
