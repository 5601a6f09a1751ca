"""More steps for a run, a run that starts from another one, held-out losses that choose the adapter, a run for PEFT."""

import json
import shutil
from dataclasses import replace
from functools import cache

import pytest
import torch
from peft import AutoPeftModelForCausalLM

import qsvd
from qsvd.commands.train import train
from qsvd.data.examples import first_lines
from qsvd.errors import BadInput, Interrupted
from qsvd.prepare.quantize_first import prepare_training
from qsvd.training.checkpoints import checkpoints
from tests.adapters.results import in_float32
from tests.runs import (
    TEXTS,
    TRAINED,
    interrupting,
    labelled_rows,
    language_base,
    outcome,
    steps_of,
    text_rows,
    training,
    write_rows,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning"),  # PEFT, TRL: old name
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),  # the components, replaced
]
CONSTANT = {"schedule": "constant", "warmup": 0.0, "accumulate": 1}
WILD = {**CONSTANT, "accumulate": 2, "learning_rate": 0.02, "eval_every": 1}  # the held-out loss falls, and rises again
IDS = torch.arange(3, 67).reshape(2, 32)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Texts and others to validate on."""
    folder = tmp_path_factory.mktemp("texts")
    write_rows(folder / "valid.jsonl", text_rows()[10:])
    return write_rows(folder / "texts.jsonl", text_rows()[:10])


@pytest.fixture
def options(language, data, tmp_path):
    return training(language, data, tmp_path / "run", valid=data.replace("texts.jsonl", "valid.jsonl"), **CONSTANT)


@pytest.fixture(scope="module")
def complete(language, data, tmp_path_factory):
    """A run of these options."""
    run = tmp_path_factory.mktemp("complete") / "run"
    train(training(language, data, run, valid=data.replace("texts.jsonl", "valid.jsonl"), **CONSTANT))
    return run


@pytest.fixture
def done(options, complete):
    """The options of a run that is complete."""
    shutil.copytree(complete, options.out)
    return options


def longer(options, steps, **changes):
    return replace(options, steps=steps, resume=True, **changes)


def summary(options):
    return json.loads((options.out / "summary.json").read_text())


def held_out(run):
    return {step["number"]: step["held_out"] for step in steps_of(run) if step["held_out"] is not None}


def test_more_steps_end_where_a_run_of_as_many_ends_also_after_a_stop(done, tmp_path, monkeypatch):
    more = longer(done, 6, save_every=2)
    with monkeypatch.context() as patch:
        interrupting(patch, 5)
        with pytest.raises(Interrupted):
            qsvd.commands.train.main(more)
    assert not (done.out / "summary.json").exists(), "the shorter run's summary would say that all is done"
    train(more)
    train(replace(done, steps=6, out=tmp_path / "straight"))
    assert outcome(done.out) == outcome(tmp_path / "straight")
    assert summary(done)["steps"] == 6


def test_the_schedule_is_that_of_all_steps(options, tmp_path):
    options = replace(options, schedule="cosine", learning_rate=1e-3, steps=2)
    train(options)
    train(longer(options, 4))
    train(replace(options, steps=4, out=tmp_path / "straight"))
    rates = [[step["learning_rate"] for step in steps_of(run)] for run in (options.out, tmp_path / "straight")]
    assert rates[0][2:] == rates[1][2:]
    assert rates[0][:2] != rates[1][:2]
    losses = [step["loss"] for step in steps_of(options.out)]
    assert losses[3] != losses[2], "the rate of the last step was zero"


def test_fewer_steps_than_are_done_and_other_options_are_refused(done):
    options = done
    with pytest.raises(BadInput, match=r"has 4 steps already, more than 3; give more --steps or --epochs"):
        train(longer(options, 3))
    with pytest.raises(BadInput, match=r"was written with other options: seed 0 there, 1 now"):
        train(longer(options, 8, seed=1))
    with pytest.raises(
        BadInput, match=r"steps 4 there, 8 now; give the same options to continue, or --resume for more steps"
    ):
        train(replace(options, steps=8))
    assert summary(options)["steps"] == 4


def test_measuring_on_the_way_changes_no_byte_of_the_training(done, tmp_path):
    options = done
    measured = replace(options, out=tmp_path / "measured", eval_every=3)
    train(measured)
    assert (options.out / TRAINED).read_bytes() == (measured.out / TRAINED).read_bytes()
    assert [step["loss"] for step in steps_of(options.out)] == [step["loss"] for step in steps_of(measured.out)]
    assert held_out(measured.out).keys() == {3, 4}, "every third step, and the last"
    assert held_out(measured.out)[4] == summary(options)["held_out_after"]
    assert held_out(options.out) == {}


def test_early_stopping_ends_a_run_that_no_longer_gets_better_and_its_best_adapter_is_kept(
    options, tmp_path, monkeypatch
):
    """Also where the run dies before it is finished."""
    options = replace(options, **WILD, steps=30, early_stopping=2, keep=1, keep_best=True)
    with monkeypatch.context() as patch:
        patch.setattr("qsvd.commands.train.finish_run", no_space)
        with pytest.raises(OSError, match="no space"):
            train(options)
    train(replace(options, resume=True))
    losses = held_out(options.out)
    best, last = min(losses, key=losses.get), len(losses)
    assert 1 < best < last == best + 2 < 30
    assert summary(options)["steps"] == last
    assert summary(options)["best_step"] == best
    assert summary(options)["held_out_after"] == losses[best]
    assert [path.name for path in checkpoints(options.out)] == [f"checkpoint-{best}", f"checkpoint-{last}"]
    train(replace(options, out=tmp_path / "short", steps=best, early_stopping=None, keep_best=False))
    assert (options.out / TRAINED).read_bytes() == (tmp_path / "short" / TRAINED).read_bytes()


def no_space(*_):
    raise OSError(28, "no space")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def trained(home, language, data):
    """The folder of a run of a method on a base of a rank, made once, by a command in `home`."""
    shutil.copytree(language.parent, home / "rank-16")

    @cache
    def make(method, rank=16):
        with pytest.MonkeyPatch.context() as patched:
            patched.chdir(home)
            base = language_base(home / f"rank-{rank}", rank=rank).relative_to(home)
            chosen = {"method": method, "rank": None if method == "pissa" else 4, "learning_rate": 1e-2}
            valid = data.replace("texts.jsonl", "valid.jsonl")
            return train(
                training(base, data, home / f"{method}-{rank}", valid=valid, steps=2, accumulate=1, **chosen)
            ).path

    return make


METHODS = ("pissa", "edora")  # tests/training/test_methods.py begins and goes on with all


@pytest.mark.parametrize("method", METHODS)
def test_a_run_starts_from_the_adapter_of_another(options, home, trained, method):
    first = trained(method)
    second = replace(options, base=home / "rank-16" / "out", method=method, init_from=first)
    second = replace(second, rank=None if method == "pissa" else 4, steps=1)
    train(second)
    before = json.loads((first / "summary.json").read_text())
    assert summary(second)["held_out_before"] == before["held_out_after"]
    assert summary(second)["method"] == method
    assert summary(second)["held_out_after"] != before["held_out_after"]


def test_an_adapter_that_does_not_fit_is_refused(done, tiny, tmp_path):
    options = done
    fresh = replace(options, out=tmp_path / "second", init_from=options.out)
    with pytest.raises(BadInput, match=r"run has another adapter: leave out --method \(pissa there\)"):
        train(replace(fresh, method="lora"))
    with pytest.raises(BadInput, match=r"--init-from .*second holds no trained adapter"):
        train(replace(fresh, init_from=tmp_path / "second"))
    with pytest.raises(BadInput, match=r"was trained on another quantized model than"):
        train(replace(fresh, base=tiny))
    labels = write_rows(tmp_path / "labels.jsonl", labelled_rows())
    with pytest.raises(BadInput, match=r"--init-from .*run has the classes none, and .*labels.jsonl has a, b"):
        train(replace(fresh, data=labels, valid=None, task="classification"))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"keep_best": True}, "--keep-best cannot be used without held-out losses to compare: give --eval-every N too"),
        (
            {"early_stopping": 2},
            "--early-stopping cannot be used without held-out losses to compare",
        ),
        ({"eval_every": 2, "valid": None}, "--eval-every needs held-out examples: give --valid DATA"),
        ({"eval_every": 0}, "--eval-every 0 is below 1"),
    ],
)
def test_a_measurement_that_cannot_be_made_is_refused(options, changes, sentence):
    with pytest.raises(BadInput, match=sentence):
        train(replace(options, **changes))
    assert not options.out.exists()


@pytest.mark.parametrize(("examples", "count"), [(14, 1), (79, 2), (80, 8)])
def test_at_least_8_examples_are_held_out_where_that_is_a_tenth_or_less(language, tmp_path, examples, count):
    rows = [{"text": f"{number} {TEXTS[number % 14][:40]}"} for number in range(examples)]
    options = training(language, write_rows(tmp_path / "d.jsonl", rows), tmp_path / "run", held_out=0.02)
    prepared = prepare_training(options).data
    assert len(prepared.held_out.input_ids) == count
    assert len(prepared.train.input_ids) == examples - count
    said = first_lines(options, prepared)[-1]
    assert (f"Held out: {count} of {examples} examples, since" in said) == (count < 8)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize(("method", "rank"), [*((method, 16) for method in METHODS), ("lora", 0)])
def test_peft_opens_a_run_from_everywhere(home, trained, tmp_path, monkeypatch, method, rank):
    shutil.copytree(trained(method, rank), tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    theirs = logits(in_float32(AutoPeftModelForCausalLM.from_pretrained("../run")))
    ours = logits(qsvd.load("../run", device="cpu", dtype=torch.float32))
    start = logits(qsvd.load(home / f"rank-{rank}" / "out", device="cpu", dtype=torch.float32))
    assert (theirs - ours).abs().max() < 1e-3 * (ours - start).abs().max()


def test_a_run_whose_model_has_moved_says_how_to_load_it(options, tmp_path):
    base = shutil.copytree(options.base, tmp_path / "base" / "out")
    train(replace(options, base=base, steps=1))
    base.rename(tmp_path / "moved")
    with pytest.raises(BadInput, match=r"run was trained on .*base/out, which does not exist; give its new folder"):
        qsvd.load(options.out)
    assert torch.isfinite(logits(qsvd.load(tmp_path / "moved", adapter=options.out))).all()


def test_a_trained_classifier_is_written_for_peft_if_peft_can_hold_its_head(bert, tmp_path, capsys):
    options = training(bert, write_rows(tmp_path / "l.jsonl", labelled_rows()), tmp_path / "run", steps=1)
    train(options)
    written = (options.out / "adapter_config.json").is_file()
    assert written or "has no files for PEFT: " in capsys.readouterr().err
