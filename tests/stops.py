"""Runs that end early: what shows progress raises, or the process is killed."""

import multiprocessing
import os
import signal

import torch

FORK = multiprocessing.get_context("fork")


class Stopped(Exception):
    """The run was to end here."""


class StopAfter:
    """Shows progress by keeping it in `seen`, and raises Stopped at call number `last`."""

    def __init__(self, last: int | None = None):
        self.last, self.seen = last, []

    def __call__(self, progress):
        self.seen.append(progress)
        if len(self.seen) == self.last:
            raise Stopped


def killed(monkeypatch, owner, name, number, work):
    """Do the work in a process that gets SIGKILL right before its so-manieth call of owner.name."""
    called, calls = getattr(owner, name), 0

    def dying(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return called(*arguments, **options)

    def forked():
        torch.set_num_threads(torch.get_num_threads())  # else threads of the work make torch's pool anew, at once
        work()

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, dying)
        process = FORK.Process(target=forked)
        process.start()
        process.join(timeout=600)
    assert process.exitcode == -signal.SIGKILL
