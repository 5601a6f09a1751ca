"""tools/gpu_check: parts end at their limits, failures come first, and the parts run on a CPU."""

import runpy
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest
import torch

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
    flags = ["--folder", str(tmp_path), "--parts", "versions", "decode", "gate", "plan"]
    monkeypatch.setattr(sys, "argv", ["gpu_check", *flags])
    assert gpu_check.main() == 1
    report = (tmp_path / "summary.md").read_text()
    assert report in capfd.readouterr().out
    assert "2 of 4 parts failed" in report
    assert report.index("FAILED: decode: exit code 1") < report.index("FAILED: gate: ended after its limit of 5 s")
    assert report.index("no decoder") < report.index("FAILED: gate")
    assert report.index("FAILED: gate") < report.index("| peak | 7 |")
    assert (tmp_path / "gate.txt").read_text() == "begun\n"
    assert f"torch {torch.__version__.partition('+')[0]}" in (tmp_path / "versions.txt").read_text()


def exit_code_of(program):
    """Of a program in this process, which has imported everything."""
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as ended:
        return ended.code
    return 0


@pytest.mark.slow
def test_it_compares_offloaded_gradients_on_a_cpu(gpu_check, tmp_path, monkeypatch, capsys):
    for command in gpu_check.gate(gpu_check.Options(tmp_path, scale=64, device="cpu")):
        monkeypatch.setattr(sys, "argv", command[1:])
        assert not exit_code_of(command[1])
    assert "57 of 57 gradients (and the loss) are equal; wrong: []" in capsys.readouterr().out
