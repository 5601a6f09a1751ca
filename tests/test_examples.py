"""The programs in examples/ run as they stand, on the first block of the embedded model."""

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import qsvd
from qsvd.commands.demo import FINE_TUNING
from tests.runs import language_base

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs an example as Python runs a program, and returns what it prints."""

    def printed(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [str(EXAMPLES / name), *map(str, arguments)])
        capsys.readouterr()
        runpy.run_path(sys.argv[0], run_name="__main__")
        return capsys.readouterr().out

    return printed


def test_every_example_is_run_here():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"split_one_matrix.py", "train_loop.py"}


@pytest.mark.slow
def test_components_of_the_matrix_lower_its_error_and_cost_what_they_take(run):
    printed = run("split_one_matrix.py")
    bits = float(re.search(r"([\d.]+) bits per weight at rank 16", printed)[1])
    before, after = (float(number) for number in re.findall(r"relative error ([\d.]+)", printed))
    scales = 512 * 1024 / 64  # 8 bits each, and a float32 for every 256 of them
    stored = 512 * 1024 * 4 + scales * 8 + scales / 256 * 32 + (512 + 1024) * 16 * 16
    assert bits == pytest.approx(stored / (512 * 1024), abs=0.01)
    assert 0.09 < before < 0.2, "NF4 leaves 0.092 of Gaussian noise, and more where columns stand out"
    assert after < 0.9 * before, "the outlier columns are of rank 11, which 16 components hold"


@pytest.mark.slow
def test_the_loop_lowers_the_loss_and_saves_what_loads_again(run, tmp_path):
    out = language_base(tmp_path)
    printed = run("train_loop.py", out, FINE_TUNING, tmp_path / "run", 12)
    losses = [float(number) for number in re.findall(r"loss ([\d.]+)", printed)]
    assert len(losses) == 12
    assert np.mean(losses[-4:]) < np.mean(losses[:4])
    start, trained = qsvd.load(out), qsvd.load(out, adapter=tmp_path / "run")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert not torch.allclose(start(ids).logits, trained(ids).logits)
    frozen = {name: tensor for name, tensor in start.named_buffers() if ".adapter." not in name}
    again = dict(trained.named_buffers())
    assert frozen
    assert all(torch.equal(tensor, again[name]) for name, tensor in frozen.items())
