"""What holds for all tests: the same draws in every run, no deadline on a slow machine, and one thread.

The matrices here are small: threads would wait for each other longer than they work, and change the last bits.
"""

import gc
import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read when NumPy and SciPy are first imported

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile(
    "repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=False
)
settings.load_profile("repeatable")


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
