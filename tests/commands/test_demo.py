"""The embedded model is what the demo says it is, and the demo shows that components give back what NF4 costs."""

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open

from qsvd.cli import run
from qsvd.commands import demo
from qsvd.commands.demo import MODEL
from qsvd.commands.quantize import quantize


def test_the_embedded_model_is_small_and_its_widths_divide_by_64() -> None:
    file = MODEL / "model.safetensors"
    assert file.stat().st_size <= 10_000_000
    with safe_open(file, framework="pt") as tensors:
        shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118  # no dict
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"BF16"}  # noqa: SIM118
    matrices = [shape for shape in shapes if len(shape) == 2]
    assert 2e6 <= sum(rows * columns for rows, columns in matrices) <= 5e6
    assert all(size % 64 == 0 for shape in matrices for size in shape)


def rows_of(table: str) -> list[list[str]]:
    """The cells of the lines of a table."""
    return [line.split("│") for line in table.splitlines() if line.startswith("│")]


@pytest.mark.slow
def test_components_bring_perplexity_back_and_fine_tuning_lowers_the_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "book.txt").write_text(demo.FINE_TUNING.read_text(encoding="utf-8")[:800], encoding="utf-8")
    monkeypatch.setattr(demo, "FINE_TUNING", tmp_path / "book.txt")  # for two steps a run
    ways = tuple(replace(way, base_rank=min(way.base_rank, 16)) for way in demo.WAYS)
    monkeypatch.setattr(demo, "WAYS", ways)  # on the models of the table
    monkeypatch.setattr(demo, "quantize", lambda options: quantize(replace(options, iterations=1)))
    short = ["--ranks", "0", "16", "--tokens", "1024", "--epochs", "2"]
    assert run(["demo", "--out", str(tmp_path), *short]) == 0
    costs, tuned = capsys.readouterr().out.split("Quantized model at several ranks")[1].split("Fine-tuning")
    original, plain, split = (float(cells[4].split()[0]) for cells in rows_of(costs))
    assert original < split < plain
    assert plain < 1.2 * original
    methods = {cells[1].split(",")[0].strip(): (float(cells[4]), float(cells[5])) for cells in rows_of(tuned)}
    assert list(methods) == ["QPiSSA", "QLoRA", "EDoRA"]
    assert all(after < before for before, after in methods.values())


def test_no_ranks_and_too_few_tokens_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(["demo", "--out", str(tmp_path), "--tokens", "100"]) == 2
    assert "--tokens at least 512, not 100" in capsys.readouterr().err
