"""What is written in the background: in which order, how much may wait, and what follows an error."""

import errno
import threading

import pytest
import torch

from qsvd.files.quantize_folder import BackgroundWriter

TENSOR = torch.zeros(25)  # 100 bytes


class HeldFolder:
    """Stands for an OutputFolder: a job ends when it is let go, and notes what it was; the jobs of `bad` fail."""

    def __init__(self, *bad):
        self.done, self.bad, self.gates = [], bad, {}

    def gate(self, job):
        return self.gates.setdefault(job, threading.Event())

    def write(self, job):
        assert self.gate(job).wait(timeout=600)
        if job in self.bad:
            raise OSError(errno.ENOSPC, "No space left")
        self.done.append(job)

    def save(self, index, residual, factors, record, source_digest):
        given = (residual, factors, record, source_digest)
        assert given == ({"r": TENSOR}, {"f": TENSOR}, f"record {index}", "s")
        self.write(index)

    def write_shard(self, file, indices, copied):
        assert (indices, copied) == ((0,), [])
        self.write(file)

    def let_go(self, *jobs):
        for job in jobs:
            self.gate(job).set()


def save(writer, index):
    writer.save(index, {"r": TENSOR}, {"f": TENSOR}, f"record {index}", "s")


def begin(work, *arguments):
    thread = threading.Thread(target=work, args=arguments)
    thread.start()
    return thread


def test_weights_are_saved_in_order_and_a_shard_is_joined_meanwhile_after_its_weights():
    folder = HeldFolder()
    with BackgroundWriter(folder, 1000) as writer:
        save(writer, 0)
        save(writer, 1)
        writer.write_shard("first", (0,), [])
        save(writer, 2)
        folder.let_go("first", 1, 2)
        assert folder.done == []
        folder.let_go(0)
        writer.wait()
        assert [job for job in folder.done if job != "first"] == [0, 1, 2]
        assert folder.done.index("first") > folder.done.index(1)
        writer.write_shard("second", (0,), [])
        save(writer, 3)
        folder.let_go(3)
        writer._saver.submit(int).result()
        assert folder.done[-1] == 3, "the shard is still being joined"
        folder.let_go("second")
    assert folder.done[-1] == "second"


def test_no_more_bytes_wait_than_are_allowed():
    folder = HeldFolder()
    with BackgroundWriter(folder, 500) as writer:
        save(writer, 0)
        save(writer, 1)
        third = begin(save, writer, 2)
        third.join(timeout=0.05)
        assert third.is_alive()
        folder.let_go(0)
        third.join(timeout=600)
        assert not third.is_alive()
        folder.let_go(1, 2)
    assert folder.done == [0, 1, 2]


def test_a_weight_above_the_limit_waits_alone():
    folder = HeldFolder()
    folder.let_go(0, 1)
    with BackgroundWriter(folder, 50) as writer:
        save(writer, 0)
        save(writer, 1)
        assert folder.done[0] == 0
    assert folder.done == [0, 1]


def written(folder, work, most_bytes=1000):
    """Return the error that ends the block."""
    with pytest.raises((OSError, KeyboardInterrupt)) as caught:  # noqa: SIM117  # the block is what is tried
        with BackgroundWriter(folder, most_bytes) as writer:
            work(writer)
    return caught


def test_after_an_error_no_later_weight_is_saved_and_the_caller_learns_of_it():
    folder = HeldFolder(1)
    folder.let_go(0, 2, 3, "shard")
    reached = []

    def work(writer):
        for index in range(3):
            save(writer, index)
        writer.write_shard("shard", (0,), [])
        folder.let_go(1)
        reached.append(True)
        save(writer, 3)
        reached.append(True)

    assert written(folder, work, 400).match("No space left")
    assert folder.done == [0]
    assert len(reached) == 1, "the third call waits for the weight that fails"


@pytest.mark.parametrize("comes_after", [True, False])
def test_an_error_of_a_shard_reaches_the_caller(comes_after):
    folder = HeldFolder("shard")
    folder.let_go(0, "shard")

    def work(writer):
        if not comes_after:
            save(writer, 0)
        writer.write_shard("shard", (0,), [])
        if comes_after:
            writer._joiner.submit(int).result()  # until it has failed
            save(writer, 0)

    assert written(folder, work).match("No space left")
    assert folder.done == ([] if comes_after else [0])


def test_a_block_that_fails_saves_its_weights_and_begins_no_shard():
    folder = HeldFolder()
    folder.let_go("second")

    def work(writer):
        writer.write_shard("first", (0,), [])
        save(writer, 0)
        writer.write_shard("second", (0,), [])
        raise KeyboardInterrupt

    failing = begin(written, folder, work)
    failing.join(timeout=0.05)
    assert failing.is_alive(), "until its weights are saved"
    folder.let_go(0, "first")
    failing.join(timeout=600)
    assert sorted(folder.done, key=str) == [0, "first"]
