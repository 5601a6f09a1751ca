"""tools/gpu_check: parts end at their limits, failures come first, and the parts run on a CPU."""

import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "gpu_check"


@pytest.fixture
def gpu_check(monkeypatch):
    loader = SourceFileLoader("gpu_check", str(TOOL))
    module = module_from_spec(spec_from_loader("gpu_check", loader))
    monkeypatch.setitem(sys.modules, "gpu_check", module)  # where dataclasses look for their module
    loader.exec_module(module)
    return module


def test_a_part_that_fails_or_takes_too_long_does_not_stop_the_others(gpu_check, tmp_path, monkeypatch, capfd):
    def python(code):
        return lambda _: [[sys.executable, "-c", code]]

    monkeypatch.setattr(gpu_check, "LIMITS", gpu_check.LIMITS | {"gate": 5})
    monkeypatch.setattr(gpu_check, "decode", python("raise SystemExit('no decoder')"))
    monkeypatch.setattr(gpu_check, "gate", python("print('begun', flush=True); import time; time.sleep(600)"))
    monkeypatch.setattr(gpu_check, "plan", python("print('| peak | 7 |')"))
    flags = ["--folder", str(tmp_path), "--parts", "decode", "gate", "plan"]
    monkeypatch.setattr(sys, "argv", ["gpu_check", *flags])
    assert gpu_check.main() == 1
    report = (tmp_path / "summary.md").read_text()
    assert report in capfd.readouterr().out
    assert "2 of 3 parts failed" in report
    assert report.index("FAILED: decode: exit code 1") < report.index("FAILED: gate: ended after its limit of 5 s")
    assert report.index("no decoder") < report.index("FAILED: gate")
    assert report.index("FAILED: gate") < report.index("| peak | 7 |")
    assert (tmp_path / "gate.txt").read_text() == "begun\n"


@pytest.mark.slow
def test_it_compares_offloaded_gradients_on_a_cpu(tmp_path):
    flags = ["--folder", tmp_path, "--scale=64", "--device=cpu", "--parts", "versions", "gate"]
    done = subprocess.run([sys.executable, TOOL, *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 of 2 parts failed." in done.stdout
    assert "57 of 57 gradients (and the loss) are equal; wrong: []" in (tmp_path / "gate.txt").read_text()
