"""The embedded model is what the demo says it is, and the demo shows that components give back what NF4 costs."""

import re
from pathlib import Path

import pytest
from safetensors import safe_open

from qsvd.cli import run
from qsvd.commands.demo import MODEL


def test_the_embedded_model_is_small_and_its_widths_divide_by_64() -> None:
    file = MODEL / "model.safetensors"
    assert file.stat().st_size <= 10_000_000
    with safe_open(file, framework="pt") as tensors:
        shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118  # no dict
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"BF16"}  # noqa: SIM118
    matrices = [shape for shape in shapes if len(shape) == 2]
    assert 2e6 <= sum(rows * columns for rows, columns in matrices) <= 5e6
    assert all(size % 64 == 0 for shape in matrices for size in shape)


@pytest.mark.slow
def test_components_bring_the_held_out_perplexity_back(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(["demo", "--out", str(tmp_path), "--ranks", "0", "32", "--tokens", "4096"]) == 0
    table = capsys.readouterr().out.split("What 4 bits cost")[1]
    rows = [re.findall(r"[\d.]+", line.split("│")[4])[0] for line in table.splitlines() if line.startswith("│")]
    original, plain, split = map(float, rows)
    assert original < split < plain
    assert plain < 1.2 * original


def test_no_ranks_and_too_few_tokens_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(["demo", "--out", str(tmp_path), "--tokens", "100"]) == 2
    assert "--tokens at least 512, not 100" in capsys.readouterr().err
