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
from tests.runs import TEXTS, classifier_base, labelled_rows, text_rows, training, write_rows

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
ROUNDING = 2e-5  # relative, of a mean over other parts of the tokens of a step
STEP = ("--batch-size", 2, "--max-length", 40, "--held-out", 0, "--device", "cpu")
CASES = {  # options, with --shard or not
    "lora": (("--prune-every", 2, "--prune-share", 0.3, "--gradient-checkpointing", "no"), "yes"),  # looks at inputs
    "dora": (("--precondition", "riemannian"), "yes"),  # reads the residual for its norms
    "adalora": (("--rank", 4, "--delta-t", 1, "--target-rank", 2, "--packing", "--layer-major"), "no"),
}
FLOATS = ("loss", "grad_norm", "learning_rate")


SIZES = {  # steps, batches of a step, rows; the second step of an epoch has one batch
    "lora": (3, 6, 13),  # the third is of another epoch
    "dora": (2, 4, 9),
    "adalora": (2, 4, 9),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, language):
    folder = tmp_path_factory.mktemp("train")
    (folder / "language").symlink_to(language.parent)
    rows = [*text_rows(), {"text": TEXTS[0][30:]}]
    for name, (_, _, count) in SIZES.items():
        write_rows(folder / f"{name}.jsonl", rows[:count])
    return folder


def arguments(folder, out, method, *more):
    base, rate = folder / "language" / "out", ("--learning-rate", 1e-3)
    steps, accumulate, _ = SIZES[method]
    sizes = ("--steps", steps, "--accumulate", accumulate)
    return ("train", base, folder / f"{method}.jsonl", "--out", out, "--method", method, *STEP, *sizes, *rate, *more)


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
        launched(folder, 1, *arguments(folder, out, name, *CASES[name][0]))
        return steps_of(out)

    return of


@pytest.mark.parametrize("name", ["dora", "adalora"])  # lora: stopped and gone on with, below
def test_the_steps_are_those_of_one_process(folder, alone, name):
    expected, out, (chosen, shard) = alone(name), folder / f"{name}-2", CASES[name]
    shown = launched(folder, 2, *arguments(folder, out, name, *chosen, "--shard", shard))
    assert shown[1:] == [["", ""]], "the first process alone prints"
    assert_same(steps_of(out), expected, last=SIZES[name][0])
    assert expected[-1]["loss"] != expected[0]["loss"]


def test_a_classifier_weights_the_batches_of_a_short_step_alike(folder):
    base = classifier_base(folder / "classifier", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    rows = write_rows(folder / "labelled.jsonl", labelled_rows(9))
    valid = write_rows(folder / "valid.jsonl", labelled_rows(5))
    for count, shard in ((1, "no"), (2, "yes")):
        out = folder / f"classes-{count}-{shard}"
        words = ("train", base, rows, "--out", out, "--method", "lora", *STEP, "--steps", 2, "--learning-rate", 1e-3)
        words = (*words, "--accumulate", 4, "--valid", valid, "--eval-every", 1, "--keep-best", "--shard", shard)
        launched(folder, count, *words)
    alone, out = (folder / f"classes-{name}" for name in ("1-no", "2-yes"))
    ends = ("held_out_before", "held_out_after", "accuracy_after", "best_step")
    assert_same(steps_of(out), steps_of(alone), last=2)
    found, wanted = (json.loads((run / "summary.json").read_text()) for run in (out, alone))
    assert [found[name] for name in ends] == pytest.approx([wanted[name] for name in ends], rel=ROUNDING)


def test_a_process_without_a_batch_in_the_first_step_judges_no_loss(folder, tmp_path):
    rows = write_rows(tmp_path / "texts.jsonl", text_rows()[:1])
    words = ("train", folder / "language" / "out", rows, "--out", tmp_path / "run", "--method", "lora", *STEP)
    codes, printed = together(2, tmp_path / "shown", *words, "--accumulate", 2, "--steps", 1, "--shard", "yes")
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


def test_any_number_goes_on_where_ctrl_c_or_a_death_has_ended_all(folder, alone):
    out, last = folder / "stopped", SIZES["lora"][0]
    words = arguments(folder, out, "lora", "--save-every", 2, *CASES["lora"][0])

    def ended(count, at):
        codes, printed = together(count, folder / "shown", *words, "--shard", "yes", at=at)
        assert len(codes) == count
        return codes, lines(printed)

    codes, said = ended(2, at_step(1, 1, lambda: os.kill(os.getpid(), signal.SIGINT)))
    assert codes == [130, 130]
    assert said == [f"qsvd: interrupted; the last step is saved, the same command continues in {out}"]
    assert (out / "checkpoint-1").is_dir()
    (*others, dead), said = ended(3, at_step(last, 2, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    assert dead == -signal.SIGKILL
    assert {1} <= {*others} <= {1, -signal.SIGTERM}
    kept = "checkpoint-2 is kept, and the same command continues from it"
    assert said == [f"qsvd: another process of the run ended; {kept}"]
    launched(folder, 1, *words)
    assert_same(steps_of(out), alone("lora"), last=last)


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
        qsvd.train(training(folder / "language" / "out", str(folder / "lora.jsonl"), folder / "python"))
