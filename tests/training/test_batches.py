"""--batch-size auto: the division of a step into batches, by trying every one; and runs that it divides."""

import json

import pytest
import torch

from qsvd.cli import run
from qsvd.errors import BadInput
from qsvd.memory.duration import GPU, step_time
from qsvd.memory.items import Limits
from qsvd.memory.placement import GPU_SHARE, Wish, fastest_batches, place
from qsvd.prepare.machine import round_number
from qsvd.prepare.train import prepare_train
from tests.memory.large import GB, llama_70b, training
from tests.runs import settings, steps_of, text_rows, trainer, write_rows
from tests.runs import training as run_of

AUTO = Wish(unrecomputed="auto")
SIXTEEN = (16, 4, 1)


def divisions(tokens):
    return [training(tokens, batch=size, accumulate=16 // size) for size in SIXTEEN]


@pytest.mark.parametrize(("gpu", "tokens"), [(2, 2048), (8, 128), (12, 128)])  # none, 16, 4
def test_the_chosen_batches_have_the_shortest_step_of_those_that_fit(gpu, tokens):
    limits, model = Limits(gpu * GB, 16 * GB), llama_70b(16, layers=16)
    seconds = {}
    for one in divisions(tokens):
        placed = place(model, one, Limits(int(GPU_SHARE * gpu * GB), 16 * GB), AUTO)
        if placed.memory.fits:
            seconds[one.batch.batch] = step_time(model, one, placed.placement, GPU).seconds
    chosen = fastest_batches(model, divisions(tokens), limits, AUTO).batch.batch
    if not seconds:
        assert chosen == 1
        return
    assert seconds[chosen] == min(seconds.values())
    assert chosen == max(size for size, time in seconds.items() if time == seconds[chosen])


def test_a_step_has_a_number_of_sequences_that_divides_well():
    assert [round_number(wanted) for wanted in (0.2, 1, 1.4, 3, 5.2, 13, 100, 478)] == [1, 1, 1, 3, 6, 12, 96, 512]


@pytest.fixture
def divided(language, tmp_path, monkeypatch):
    """Returns what a run in a folder does with --batch-size auto, on a machine that chooses this size."""
    data = write_rows(tmp_path / "data.jsonl", text_rows())

    def train(folder, size, *flags):
        monkeypatch.setattr(
            "qsvd.prepare.machine.fastest_batches",
            lambda _, ways, *__: next((w for w in ways if w.batch.batch == size), ways[0]),
        )
        given = ["--out", str(tmp_path / folder), "--max-length", "32", "--held-out", "0", "--device", "cpu"]
        return run(["train", str(language), data, *given, "--any-start", *flags])

    return train


AUTO_FLAGS = ("--batch-size", "auto", "--step-tokens", "90")


def test_all_divisions_train_the_same_and_a_run_keeps_its_own(divided, tmp_path, capsys):
    for folder, size in (("two", 2), ("four", 4)):
        assert divided(folder, size, *AUTO_FLAGS, "--steps", "2") == 0
        assert f"Batch: {size} x {4 // size} sequences a step, about " in capsys.readouterr().err
    for mine, theirs in zip(steps_of(tmp_path / "four"), steps_of(tmp_path / "two"), strict=True):
        assert mine["tokens"] >= theirs["tokens"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    assert divided("two", 4, *AUTO_FLAGS, "--steps", "3", "--resume") == 0
    identity = json.loads((tmp_path / "two" / "run.json").read_text())
    assert (identity["batch_size"], identity["accumulate"]) == (2, 2)
    numbers = ("--batch-size", "1", "--accumulate", "4")
    assert divided("two", 4, *numbers, "--steps", "4", "--resume") == 0  # told to
    assert json.loads((tmp_path / "two" / "run.json").read_text())["batch_size"] == 1
    assert divided("two", 4, *AUTO_FLAGS[:-1], "200", "--steps", "5", "--resume") == 2
    assert "accumulate 4 there, 8 now" in capsys.readouterr().err


def test_a_dry_run_shows_what_the_run_has_recorded(divided, capsys):
    flags = (*AUTO_FLAGS, "--steps", "2")
    assert divided("run", 2, *flags, "--gradient-checkpointing", "yes") == 0
    capsys.readouterr()
    assert divided("run", 4, *flags, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "batch 2 x 32" in shown
    assert "activations of the only block are recomputed" in shown


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"batch_size": 2, "step_tokens": 64}, "--step-tokens 64 needs --batch-size auto"),
        ({"batch_size": "auto", "accumulate": 8}, "--accumulate 8 is chosen by --batch-size auto"),
    ],
)
def test_a_step_is_described_once(language, tmp_path, changes, word):
    data = write_rows(tmp_path / "data.jsonl", text_rows())
    with pytest.raises(BadInput, match=word):
        prepare_train(run_of(language, data, tmp_path / "run", **changes))


@pytest.mark.parametrize("size", [4, 1])
def test_an_encoder_decoder_has_the_mean_over_its_tokens_however_they_are_divided(translator, tmp_path, size):
    """The judge is T5 itself: the sum of the losses of all tokens by their number, one sequence at a time."""
    rows = {"input_ids": [[5, 6, 7], [8, 9], [5, 8], [4]], "labels": [[3, 4, 5, 6, 7], [9], [4, 3], [8, 1, 2]]}
    made = trainer(translator, tmp_path, rows, settings(batch_size=size, accumulate=4 // size))
    model = made.model.eval()
    with torch.no_grad():
        pairs = zip(rows["input_ids"], rows["labels"], strict=True)
        losses = [model(input_ids=torch.tensor([x]), labels=torch.tensor([y])).loss.item() * len(y) for x, y in pairs]
    made.train()
    count = sum(map(len, rows["labels"]))
    assert made.state.log_history[0]["loss"] == pytest.approx(sum(losses) / count, rel=1e-5)
