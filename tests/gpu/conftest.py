"""What holds for all tests on a GPU."""

import warnings

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
