"""What holds for all tests on a GPU."""

import os
import warnings
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _first_backward_pass():
    """Run one backward pass, in the first of a process torch warns that its thread has no CUDA context and makes it."""
    if torch.cuda.is_available():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Attempting to run cuBLAS", UserWarning)
            ones = torch.ones(2, 2, device="cuda", requires_grad=True)
            (ones @ ones).sum().backward()
            torch.cuda.synchronize()


def pytest_runtest_logstart(nodeid):
    """Name each test before it runs, in the file of QSVD_TESTS_STARTED: the last names are those that did not end."""
    if started := os.environ.get("QSVD_TESTS_STARTED"):
        with Path(started).open("a", encoding="utf-8") as file:
            file.write(f"{nodeid}\n")
