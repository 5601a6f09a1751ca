"""What holds for all tests: the same draws in every run, no deadline on a slow machine, and one thread.

The matrices here are small: threads would wait for each other longer than they work, and change the last bits.
"""

import gc
import logging
import os
from functools import cache
from importlib import metadata
from types import SimpleNamespace

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read when NumPy and SciPy are first imported

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
gc.disable()  # until all tests are imported: nothing of that is garbage
logging.root.addHandler(logging.NullHandler())  # what nobody hears is not printed, as with pytest's plugin
settings.register_profile(
    "repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=False
)
settings.load_profile("repeatable")


def pytest_collection_finish():
    gc.enable()


@pytest.fixture(autouse=True, scope="module")
def _fewer_objects_to_collect():
    """Leave what is there, most of it imports, out of garbage collections: accelerate asks for one in every run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _disk_is_not_waited_for():
    """Let the system write files when it likes: no test cuts the power, and a process that dies loses nothing by it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def _nothing_is_looked_up_again():
    """Read the metadata of a package once, and keep no traceback of a seed for a GPU that is not used: in every run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metadata, "metadata", cache(metadata.metadata))
        for device in (torch.cuda, torch.xpu, torch.mtia):
            patch.setattr(device, "traceback", SimpleNamespace(format_stack=list))
        yield


class Heard(logging.Handler):
    """What loggers say, by the names that pytest's own plugin has for it.

    That plugin goes through the thousands of loggers of all libraries six times in every test, and is off.
    """

    def __init__(self):
        super().__init__()
        self.records = []

    def emit(self, record):
        self.records.append(record)

    def clear(self):
        self.records.clear()

    @property
    def messages(self):
        return [record.getMessage() for record in self.records]

    @property
    def text(self):
        return "\n".join(self.messages)


@pytest.fixture
def caplog():
    """What is said during a test, of loggers that pass nothing on, too."""
    heard, known = Heard(), [*logging.root.manager.loggerDict.values()]
    loggers = [logging.root, *(one for one in known if isinstance(one, logging.Logger) and not one.propagate)]
    for logger in loggers:
        logger.addHandler(heard)
    yield heard
    for logger in loggers:
        logger.removeHandler(heard)
