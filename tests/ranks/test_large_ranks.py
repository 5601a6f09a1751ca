"""Large data: the tokens on disk are made by one process, and a run on data in memory goes on with them."""

import json
import shutil

import pytest
from datasets import config

from qsvd.cli import run
from qsvd.data.large import blocks, cache
from tests.ranks.processes import lines, together
from tests.runs import text_rows, write_rows

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
ROUNDING = 2e-5  # as in test_train_ranks.py
WORDS = ("--batch-size", 2, "--accumulate", 2, "--max-length", 40, "--held-out", 0, "--device", "cpu")
RATE = ("--learning-rate", 1e-3, "--schedule", "constant", "--warmup", 0)


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "steps.jsonl").read_text().splitlines()]


def test_a_run_in_memory_goes_on_with_several_processes_that_map_the_tokens(tmp_path, monkeypatch, language):
    data = write_rows(tmp_path / "rows.jsonl", text_rows())
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    words = ["train", language, data, *WORDS, *RATE]
    whole, divided = tmp_path / "whole", tmp_path / "divided"
    assert run([*map(str, words), "--out", str(whole), "--steps", "2", "--save-every", "1"]) == 0
    shutil.copytree(whole, divided, ignore=shutil.ignore_patterns("summary.json", "checkpoint-2"))  # as one that died
    assert not (tmp_path / "cache").exists(), "small data"
    monkeypatch.setattr(blocks, "LARGE", 0)
    monkeypatch.setattr(blocks, "BLOCK", 500)
    made = cache._made

    def noted(*given):
        (tmp_path / f"made-{len([*tmp_path.glob('made-*')])}").touch()
        return made(*given)

    monkeypatch.setattr(cache, "_made", noted)
    more = ("--out", divided, "--steps", 2, "--save-every", 1, "--resume")
    codes, shown = together(2, tmp_path / "shown", *words, *more)
    assert codes == [0, 0], lines(shown)
    assert len([*tmp_path.glob("made-*")]) == 1, "the second process maps what the first one has made"
    assert losses(divided) == pytest.approx(losses(whole), rel=ROUNDING)
