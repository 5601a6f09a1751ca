"""Several processes train one adapter: step by step what one process does, whoever stops or dies."""

import json
import os
import signal
from functools import cache

import pytest

import qsvd
from qsvd.cli import run
from qsvd.training.together import DividedTraining
from tests.ranks.processes import lines, together
from tests.runs import TEXTS, classifier_base, labelled_rows, language_base, text_rows, training, write_rows

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
ROUNDING = 2e-5  # relative, of a mean over other parts of the tokens of a step
STEP = ("--batch-size", 2, "--accumulate", 6, "--max-length", 40, "--held-out", 0, "--device", "cpu")
KEPT = ("--gradient-checkpointing", "no")
CASES = {  # options, with --shard or not; 13 rows are 7 batches: the second step of an epoch has one
    "lora": (("--prune-every", 2, "--prune-share", 0.3, "--gradient-checkpointing", "no"), "yes"),  # looks at inputs
    "dora": (("--precondition", "riemannian"), "yes"),  # reads the residual for its norms
    "adalora": (("--rank", 4, "--delta-t", 1, "--target-rank", 2, "--packing", "--layer-major"), "no"),
}
FLOATS = ("loss", "grad_norm", "learning_rate")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    language_base(folder / "language", rank=8)
    write_rows(folder / "texts.jsonl", [*text_rows(), {"text": TEXTS[0][30:]}][:13])
    return folder


def arguments(folder, out, method, *more):
    base, rate = folder / "language" / "out", ("--learning-rate", 1e-3)
    return ("train", base, folder / "texts.jsonl", "--out", out, "--method", method, *STEP, *rate, *more)


def steps_of(out):
    return [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]


def assert_same(found, wanted, *, last):
    assert [step["number"] for step in found] == list(range(1, last + 1))
    assert [step["tokens"] for step in found] == [step["tokens"] for step in wanted]
    for name in FLOATS:
        assert [step[name] for step in found] == pytest.approx([step[name] for step in wanted], rel=ROUNDING), name


def launched(folder, count, *words):
    """What processes show that do a command; one is this process, so that those that it forks need import nothing."""
    codes, shown = ([run([*map(str, words)])], [[]]) if count == 1 else together(count, folder / "shown", *words)
    assert codes == [0] * count, shown
    return shown


@pytest.fixture(scope="module")
def alone(folder):
    """Returns the steps of a case in one process."""

    @cache
    def of(name):
        out = folder / f"{name}-1"
        launched(folder, 1, *arguments(folder, out, name, "--steps", 3, *CASES[name][0]))
        return steps_of(out)

    return of


@pytest.mark.parametrize("name", ["dora", "adalora"])  # lora: stopped and gone on with, below
def test_the_steps_are_those_of_one_process(folder, alone, name):
    expected, out, (chosen, shard) = alone(name), folder / f"{name}-2", CASES[name]
    shown = launched(folder, 2, *arguments(folder, out, name, "--steps", 3, *chosen, "--shard", shard))
    assert shown[1:] == [["", ""]], "the first process alone prints"
    assert_same(steps_of(out), expected, last=3)
    assert expected[-1]["loss"] != expected[0]["loss"]


def test_a_classifier_weights_the_batches_of_a_short_step_alike(folder):
    base = classifier_base(folder / "classifier", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    rows = write_rows(folder / "labelled.jsonl", labelled_rows(13))
    for count, shard in ((1, "no"), (2, "yes")):
        out = folder / f"classes-{count}-{shard}"
        words = ("train", base, rows, "--out", out, "--method", "lora", *STEP, "--steps", 2, "--learning-rate", 1e-3)
        words = (*words, "--valid", rows, "--eval-every", 1, "--keep-best", "--shard", shard)
        launched(folder, count, *words)
    alone, out = (folder / f"classes-{name}" for name in ("1-no", "2-yes"))
    ends = ("held_out_before", "held_out_after", "accuracy_after", "best_step")
    assert_same(steps_of(out), steps_of(alone), last=2)
    found, wanted = (json.loads((run / "summary.json").read_text()) for run in (out, alone))
    assert [found[name] for name in ends] == pytest.approx([wanted[name] for name in ends], rel=ROUNDING)


def test_a_process_without_a_batch_in_the_first_step_judges_no_loss(folder, tmp_path):
    rows = write_rows(tmp_path / "texts.jsonl", text_rows()[:1])
    words = ("train", folder / "language" / "out", rows, "--out", tmp_path / "run", "--method", "lora", *STEP)
    codes, printed = together(2, tmp_path / "shown", *words, "--steps", 1, "--shard", "yes")
    assert codes == [0, 0], printed


def at_step(number, rank_of_actor, act):
    """Let a process act when a step is computed, before it is recorded."""

    def at(rank):
        end_step = DividedTraining.end_step

        def acting(self):
            end_step(self)
            if rank == rank_of_actor and self.state.global_step + 1 == number:
                act()

        DividedTraining.end_step = acting

    return at


def stopping(folder, name):
    """A run with the steps of the case lora."""
    return arguments(folder, folder / name, "lora", "--steps", 3, "--save-every", 2, *CASES["lora"][0])


def test_ctrl_c_in_any_process_saves_a_step_from_which_another_number_goes_on(folder, alone):
    words = stopping(folder, "stopped")
    ctrl_c = lambda: os.kill(os.getpid(), signal.SIGINT)  # noqa: E731
    codes, printed = together(2, folder / "shown", *words, "--shard", "yes", at=at_step(1, 1, ctrl_c))
    assert codes == [130, 130]
    assert lines(printed) == [
        f"qsvd: interrupted; the last step is saved, the same command continues in {folder / 'stopped'}"
    ]
    assert (folder / "stopped" / "checkpoint-1").is_dir()
    codes, printed = together(3, folder / "shown", *words, "--shard", "yes")
    assert codes == [0, 0, 0], printed
    assert_same(steps_of(folder / "stopped"), alone("lora"), last=3)


def test_a_process_that_is_killed_ends_all_and_one_process_goes_on(folder, alone):
    words = stopping(folder, "killed")
    kill = at_step(3, 1, lambda: os.kill(os.getpid(), signal.SIGKILL))
    codes, printed = together(2, folder / "shown", *words, "--shard", "yes", at=kill)
    assert codes == [1, -signal.SIGKILL]
    kept = "checkpoint-2 is kept, and the same command continues from it"
    assert lines(printed) == [f"qsvd: another process of the run ended; {kept}"]
    launched(folder, 1, *words)
    assert_same(steps_of(folder / "killed"), alone("lora"), last=3)


def test_a_step_that_cannot_be_divided_is_refused(folder):
    words = arguments(folder, folder / "odd", "lora", "--batch-size", 4, "--accumulate", 3)
    codes, printed = together(2, folder / "shown", *words)
    assert codes == [2, 2]
    assert lines(printed) == [
        "qsvd: 2 processes divide the batches of a step among them, and --accumulate is 3, not a multiple of 2; give "
        "--batch-size 3 --accumulate 4, the same step"
    ]
    assert not (folder / "odd").exists()


def test_the_functions_for_python_say_how_several_processes_start(folder, monkeypatch):
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(qsvd.BadInput, match="works in one process: for several, start `torchrun"):
        qsvd.train(training(folder / "language" / "out", str(folder / "texts.jsonl"), folder / "python"))
