"""A run that is stopped and resumed ends in the bytes of one that was left alone, and tells the same steps."""

import json
import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from qsvd.adapters.adapter import AdapterOptions
from qsvd.cli import run
from qsvd.commands.train import train
from qsvd.console.journal import resume_point
from qsvd.prepare.train import load_start, prepare_train
from qsvd.training.checkpoints import checkpoints
from qsvd.training.run_folder import RunFolder
from qsvd.training.steps import TellSteps
from tests.gradients import write_gradients
from tests.runs import (
    TRAINED,
    labelled_rows,
    outcome,
    sequences,
    settings,
    steps_of,
    trainer,
    training,
    words,
    write_rows,
)
from tests.sealed import opened, reseal, sealed
from tests.stops import FORK

LEAST_8_BIT = 4096  # elements; bitsandbytes' min_8bit_size
LARGE = 12  # of 14 trained matrices; the other two are those of 128 outputs
EPOCH = 2  # steps: 7 sequences in batches of 2, two at a time
LENGTHS = (9, 21, 14, 30, 12, 17, 25)


def told(made, checkpoint=None):
    """Every step that a trainer tells of."""
    steps = []
    made.add_callback(TellSteps(lambda step: steps.append(step) or (False, False), float, int))
    made.train(resume_from_checkpoint=checkpoint)
    return steps


def assert_goes_on(base, folder, stops, last, options=None, **changes):
    """A trainer's steps after each stop are those without one, to the last bit; returns the last checkpoint.

    Every trainer after the first goes on from what the one before it has saved.
    """
    chosen = {"batch_size": 2, "accumulate": 2, "schedule": "cosine", "warmup": 0.25, "save_every": 1, "keep": last}
    chosen, rows, name = settings(steps=last, **(chosen | changes)), sequences(LENGTHS), f"checkpoint-{last}"
    options = {} if options is None else {"options": options}
    steps, before = told(trainer(base, folder / "alone", rows, chosen, **options)), folder / "alone"
    assert [step.number for step in steps] == [*range(1, last + 1)]
    for stop in stops:
        after = folder / f"from-{stop}"
        found = told(trainer(base, after, rows, chosen, **options), str(before / f"checkpoint-{stop}"))
        assert found == steps[stop:]
        assert (after / name / TRAINED).read_bytes() == (folder / "alone" / name / TRAINED).read_bytes()
        before = after
    return before / name


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "lora-rite"])  # paged ones are these on a CPU
def test_every_optimizer_goes_on_as_if_nothing_had_happened(language, tmp_path, optimizer):
    """One with packed rows."""
    changes = {"packing": True, "max_length": 48} if optimizer == "adamw_8bit" else {}
    saved = assert_goes_on(language, tmp_path, (1,), 2, warmup=0.0, optimizer=optimizer, **changes)
    state = torch.load(saved / "optimizer.pt", weights_only=True)["state"]
    moments = [tensor for tensor in tensors_in(state) if tensor.numel() >= LEAST_8_BIT]
    assert {tensor.dtype for tensor in moments} == {torch.uint8 if "8bit" in optimizer else torch.float32}
    assert len(moments) == 2 * LARGE


def tensors_in(state):
    """Every tensor in nested dictionaries."""
    for value in state.values():
        if isinstance(value, dict):
            yield from tensors_in(value)
        elif isinstance(value, torch.Tensor):
            yield value


@pytest.mark.parametrize(
    ("method", "options", "stops"),
    [
        ("lora", {"rank": 8, "dropout": 0.2, "target_modules": ("q_proj", "down_proj")}, (EPOCH - 1, EPOCH + 1)),
        ("lora", {"rank": 4, "own": {"lora_plus_ratio": 16.0, "refactor_every": 2}}, (3,)),
        ("xgblora", {"rank": 2, "own": {"booster_steps": 2}}, (3,)),
        ("lora", {"rank": 4, "own": {"lora_plus_ratio": 16.0, "prune_every": 2}}, (3,)),
        ("weightlora", {"rank": 4, "own": {"gate_every": 2, "grow": 1}}, (2,)),
    ],
    ids=str,
)
def test_stops_at_the_end_of_an_epoch_around_it_and_at_once(language, tmp_path, method, options, stops):
    saved = assert_goes_on(language, tmp_path, stops, EPOCH + 2, AdapterOptions(method, **options))
    state = torch.load(saved / "optimizer.pt", weights_only=True)["state"]
    is_anew = {"refactor_every", "booster_steps"} & options.get("own", {}).keys()  # every second step
    assert all(not tensor.any() for tensor in tensors_in(state)) == bool(is_anew)


def test_lora_ga_goes_on_without_the_file_that_it_started_from_and_not_with_another(language, texts, tmp_path, capsys):
    file = write_gradients(language, tmp_path / "g", 4)
    options = training(
        language, texts, tmp_path / "run", method="lora-ga", rank=4, gradients=file, steps=2, save_every=1
    )
    alone = outcome(train(options))
    (options.out / "summary.json").unlink()
    shutil.rmtree(options.out / "checkpoint-2")
    write_gradients(language, file, 8)
    assert run(words(options)) == 2
    assert "run was written with other options: the gradients changed" in capsys.readouterr().err
    file.unlink()
    assert run(words(options)) == 0
    assert outcome(options.out) == alone
    assert run(words(replace(options, out=tmp_path / "other"))) == 2
    assert "g does not exist; qsvd calibrate MODEL DATA --out" in capsys.readouterr().err
    again = prepare_train(replace(options, out=tmp_path / "again", init_from=options.out, gradients=None))
    load_start(again, is_resumed=False).save_pretrained(again.out)
    starts = [{n: t for n, t in load_file(out / TRAINED).items() if ".start_" in n} for out in (again.out, options.out)]
    assert starts[0].keys() == starts[1].keys() != set()
    assert all(torch.equal(tensor, starts[1][name]) for name, tensor in starts[0].items())


@pytest.fixture(scope="module")
def options(classifier, tmp_path_factory):
    """Of a run of three steps, each saved, with dropout."""
    data = write_rows(tmp_path_factory.mktemp("data") / "labelled.jsonl", labelled_rows())
    chosen = {"method": "lora", "accumulate": 1, "held_out": 0.2, "warmup": 0.0}
    return partial(training, classifier, data, **chosen, steps=3, save_every=1, keep=3)


@pytest.fixture(scope="module")
def undisturbed(options, tmp_path_factory):
    return train(options(tmp_path_factory.mktemp("undisturbed") / "run"))


def test_a_run_that_died_after_its_last_checkpoint_makes_its_summary(options, undisturbed, tmp_path):
    options = options(tmp_path / "run")
    names, kept = {path.name for path in undisturbed.iterdir()}, {"run.json", "start.json", "steps.jsonl"}
    gone = names - kept - {f"checkpoint-{step}" for step in (1, 2, 3)}
    assert "summary.json" in gone
    shutil.copytree(undisturbed, options.out, ignore=lambda folder, _: gone if folder == str(undisturbed) else ())
    assert run([*words(options), "--resume"]) == 0
    assert outcome(options.out) == outcome(undisturbed)
    assert {path.name for path in options.out.iterdir()} == names


def without(part):
    return lambda folder: (folder / "checkpoint-2" / part).unlink()


def unfinished(folder):
    shutil.copytree(folder / "checkpoint-2", folder / "unfinished" / "checkpoint-3")
    (folder / "unfinished" / "checkpoint-3" / "optimizer.pt").write_bytes(b"half")


def torn(folder):
    lines = (folder / "steps.jsonl").read_text().splitlines(keepends=True)
    (folder / "steps.jsonl").write_text("".join(lines[:2]) + lines[2][:25])


def untold(folder):
    lines = (folder / "steps.jsonl").read_text().splitlines(keepends=True)
    (folder / "steps.jsonl").write_text(lines[0])


def of_another_run(folder):
    lines = (folder / "steps.jsonl").read_text().splitlines(keepends=True)
    second = json.loads(lines[1])
    del second["qsvd_digest"]
    (folder / "steps.jsonl").write_text(lines[0] + sealed(second | {"loss": 1.0}, end="\n"))


def flipped(part):
    def flip(folder):
        path = folder / "checkpoint-2" / part
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)

    return flip


def nothing_saved(folder):
    for number in (1, 2):
        shutil.rmtree(folder / f"checkpoint-{number}")


def damaged(undisturbed, folder, damage):
    """The folder of a run that was killed after its second step, with some damage."""
    folder.mkdir()
    for name in ("run.json", "start.json", "steps.jsonl"):
        shutil.copyfile(undisturbed / name, folder / name)
    for number in (1, 2):
        shutil.copytree(undisturbed / f"checkpoint-{number}", folder / f"checkpoint-{number}")
    damage(folder)
    return folder


@pytest.mark.parametrize(
    ("damage", "step"),
    [
        pytest.param(without("optimizer.pt"), 1, id="no optimizer"),
        pytest.param(without("qsvd_adapter.json"), 1, id="no record"),
        pytest.param(unfinished, 2, id="unfinished"),
        pytest.param(torn, 2, id="torn line"),
        pytest.param(untold, 1, id="no line"),
        pytest.param(of_another_run, 1, id="a line of another run"),
        pytest.param(nothing_saved, None, id="no checkpoint"),
        pytest.param(flipped("optimizer.pt"), 1, id="other optimizer"),
        pytest.param(flipped("qsvd_adapter.safetensors"), 1, id="other parameters"),
        pytest.param(without("qsvd_files.json"), 1, id="no digests"),
    ],
)
def test_what_a_kill_or_a_disk_leaves_behind_is_passed_over(undisturbed, tmp_path, damage, step, capsys):
    out = damaged(undisturbed, tmp_path / "run", damage)
    known = opened(out / "run.json")
    identity = {name: value for name, value in known.items() if name not in ("format", "command", "total_steps")}
    with RunFolder(out, identity, resume=True, total=3) as folder:
        checkpoint, last = resume_point(out, folder)
    assert (checkpoint and checkpoint.name, last and last.number) == (step and f"checkpoint-{step}", step)
    assert ("checkpoint-2" in capsys.readouterr().err) == (step == 1)


def unfinished_and_torn(folder):
    unfinished(folder)
    torn(folder)


def test_a_run_goes_on_from_what_is_left_to_the_same_end(options, undisturbed, tmp_path):
    options = options(tmp_path / "run")
    damaged(undisturbed, options.out, unfinished_and_torn)
    assert run([*words(options), "--resume"]) == 0
    assert outcome(options.out) == outcome(undisturbed)


def test_a_run_whose_checkpoints_are_all_damaged_says_so(options, undisturbed, tmp_path, capsys):
    options = options(tmp_path / "run")
    shutil.copytree(
        undisturbed, options.out, ignore=shutil.ignore_patterns("summary.json", "checkpoint-1", "checkpoint-3")
    )
    start = (options.out / "start.json").read_text()
    reseal(options.out / "start.json", lambda fields: fields.update(held_out_before=1.0))  # of another run
    assert run([*words(options), "--resume"]) == 1
    assert f"{options.out}/start.json is damaged: {options.out}/checkpoint-2 was written" in capsys.readouterr().err
    (options.out / "start.json").write_text(start)
    flipped("rng_state.pth")(options.out)
    assert run([*words(options), "--resume"]) == 1
    said = f"{options.out}/checkpoint-2/rng_state.pth is damaged: its digest differs; no other checkpoint is left"
    assert said in capsys.readouterr().err
    (options.out / "steps.jsonl").write_text("")
    assert run([*words(options), "--resume"]) == 1
    assert f"{options.out}/steps.jsonl lacks the step of checkpoint-2; no other" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # Python 3.12
def test_an_interrupted_process_saves_its_step_ends_with_130_and_goes_on(
    options, undisturbed, tmp_path, monkeypatch, capfd
):
    """SIGINT comes from outside, while the first step is told."""
    options = options(tmp_path / "run")
    line, sent, add_step = words(options), tmp_path / "sent", RunFolder.add_step

    def waiting(self, step):
        add_step(self, step)
        until(sent.exists)

    def interrupted():
        torch.set_num_threads(1)  # else threads of the run make torch's pool anew, at once
        sys.exit(run(line))

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "add_step", waiting)
        process = FORK.Process(target=interrupted)
        process.start()
    until(lambda: (options.out / "steps.jsonl").is_file() and steps_of(options.out))
    os.kill(process.pid, signal.SIGINT)
    sent.touch()
    process.join(timeout=600)
    assert process.exitcode == 130
    out, err = capfd.readouterr()
    assert out == ""
    assert "stopping after this step; press Ctrl-C again to stop at once" in err
    assert err.endswith(f"the same command continues in {options.out}\n")
    assert len(steps_of(options.out)) == 1
    assert [path.name for path in checkpoints(options.out)] == ["checkpoint-1"]
    assert run(line) == 0
    assert outcome(options.out) == outcome(undisturbed)


def until(condition, *, seconds=600):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
