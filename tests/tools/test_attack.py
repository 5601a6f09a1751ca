"""The tool that attacks qsvd: what it says of mutations whose outcome is known."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "attack"


def attack(*arguments):
    """Run the tool; it forks, so that it runs in a process without the threads of this one."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", TOOL, "--jobs", "1", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(TOOL.parents[1])},
        check=False,
    )


@pytest.mark.apart
@pytest.mark.slow
def test_mutated_files_are_refused_or_change_nothing():
    ended = attack("--only", *map(str, range(10)))
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-2000:]
    assert "\n0 faults." in ended.stdout
    assert " refused: " in ended.stdout
    assert " right: " in ended.stdout
