"""The Triton kernels without a GPU: interpreted, and compiled. With one, tests/gpu/test_normal_float_gpu.py."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

APART = Path(sys.prefix) / "triton"  # where tools/test installs it, since libraries load it if they can
IS_THERE = APART.is_dir() or find_spec("triton") is not None
pytestmark = pytest.mark.skipif(not IS_THERE, reason="needs Triton, which tools/test installs")


def checked(what, cache, **variables):
    """How many comparisons kernel_checks.py made; a process of its own, since Triton reads variables when imported."""
    command = (sys.executable, "-m", "tests.numerics.kernel_checks", what)
    path = os.pathsep.join([*map(str, sys.path), str(APART)])
    quick = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}  # one bitsandbytes function would be compiled
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": path} | quick | variables
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout)


def test_interpreted_they_give_what_torchs_operations_give(tmp_path):
    assert checked("interpret", tmp_path, TRITON_INTERPRET="1") == 4 * (8 + 4) + 3 + 2 * 7 + 8


def test_compiled_for_a_gpu_they_round_as_torchs_operations_do(tmp_path):
    assert checked("compile", tmp_path) == 4 * (1 + 1) + 1 + 2 + 1 + 3
