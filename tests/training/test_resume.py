"""A run that is stopped and resumed ends in the bytes of one that was left alone, and tells the same steps."""

import json
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from qsvd.cli import run
from qsvd.commands.train import train
from qsvd.training.checkpoints import checkpoints
from qsvd.training.settings import OPTIMIZERS
from tests.commands.folders import finished, start
from tests.commands.test_resume import wait_for
from tests.gradients import write_gradients
from tests.runs import TRAINED, interrupting, labelled_rows, outcome, steps_of, training, words, write_rows
from tests.sealed import reseal, sealed

LEAST_8_BIT = 4096  # elements; bitsandbytes' min_8bit_size
LARGE = 12  # of 14 trained matrices; the other two are those of 128 outputs
EPOCH = 4  # steps: 14 texts in batches of 2, two at a time


def stopped_and_resumed(options, monkeypatch, *stops):
    """Interrupt a run at the end of these steps, one after the other, and let it end at last."""
    line = words(options)
    for number, stop in enumerate(stops):
        interrupting(monkeypatch, stop)
        assert run(line + (["--resume"] if number else [])) == 130  # with and without
        monkeypatch.undo()
        assert len(steps_of(options.out)) == stop
    assert run(line) == 0
    return outcome(options.out)


def assert_resumes(options, tmp_path, monkeypatch, *stops):
    alone, stopped = tmp_path / "alone", tmp_path / "stopped"
    undisturbed = outcome(train(type(options)(**(vars(options) | {"out": alone}))))
    assert len(undisturbed[1]) == options.steps
    assert stopped_and_resumed(type(options)(**(vars(options) | {"out": stopped})), monkeypatch, *stops) == undisturbed
    return stopped


@pytest.mark.parametrize(("number", "optimizer"), list(enumerate(OPTIMIZERS)))
def test_every_optimizer_goes_on_as_if_nothing_had_happened(language, texts, tmp_path, monkeypatch, number, optimizer):
    """Every second one with packed rows, and with checkpoints before and after the stop."""
    changes = {"packing": True, "save_every": 1} if number % 2 else {}
    options = training(language, texts, tmp_path, steps=5, optimizer=optimizer, max_length=48, **changes)
    stopped = assert_resumes(options, tmp_path, monkeypatch, 2)
    state = torch.load(stopped / "checkpoint-5" / "optimizer.pt", weights_only=True)["state"]
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


def test_dropout_is_drawn_as_in_a_run_without_a_stop(classifier, tmp_path, monkeypatch):
    data = write_rows(tmp_path / "labelled.jsonl", labelled_rows())
    options = training(classifier, data, tmp_path, steps=6, method="lora", held_out=0.2, learning_rate=1e-3)
    assert_resumes(options, tmp_path, monkeypatch, 2)


@pytest.mark.parametrize(
    ("changes", "stops"),
    [
        ({"method": "lora", "rank": 8, "dropout": 0.2, "target_modules": ("q_proj", "down_proj")}, (EPOCH,)),
        ({"method": "pissa"}, (EPOCH - 1, EPOCH + 1)),
        ({"method": "edora", "rank": 8}, (1, 2)),
        ({"method": "lora", "rank": 4, "lora_plus_ratio": 16.0, "refactor_every": 2}, (3,)),
        ({"method": "xgblora", "rank": 2, "booster_steps": 2}, (1, 4)),
        ({"method": "lora", "rank": 4, "lora_plus_ratio": 16.0, "prune_every": 2}, (3,)),
        ({"method": "weightlora", "rank": 4, "gate_every": 2, "grow": 1}, (2, 3)),
    ],
    ids=str,
)
def test_stops_at_the_end_of_an_epoch_around_it_and_at_once(language, texts, tmp_path, monkeypatch, changes, stops):
    options = training(language, texts, tmp_path, steps=EPOCH + 2, **changes)
    stopped = assert_resumes(options, tmp_path, monkeypatch, *stops)
    state = torch.load(stopped / f"checkpoint-{EPOCH + 2}" / "optimizer.pt", weights_only=True)["state"]
    is_anew = {name for name in ("refactor_every", "booster_steps") if name in changes}  # every second step
    assert all(not tensor.any() for tensor in tensors_in(state)) == bool(is_anew)


def test_lora_ga_goes_on_without_the_file_that_it_started_from_and_not_with_another(
    language, texts, tmp_path, monkeypatch, capsys
):
    file = write_gradients(language, tmp_path / "g", 4)
    options = training(language, texts, tmp_path / "run", method="lora-ga", rank=4, gradients=file, steps=3)
    alone = outcome(train(replace(options, out=tmp_path / "alone")))
    interrupting(monkeypatch, 1)
    assert run(words(options)) == 130
    monkeypatch.undo()
    write_gradients(language, file, 8)
    assert run(words(options)) == 2
    assert "run was written with other options: the gradients changed" in capsys.readouterr().err
    file.unlink()
    assert run(words(options)) == 0
    assert outcome(options.out) == alone
    assert run(words(replace(options, out=tmp_path / "other"))) == 2
    assert "g does not exist; qsvd calibrate MODEL DATA --out" in capsys.readouterr().err
    again = replace(options, out=tmp_path / "again", init_from=options.out, gradients=None, learning_rate=1e-3)
    assert len(train(again).losses) == 3
    starts = [{n: t for n, t in load_file(run / TRAINED).items() if ".start_" in n} for run in (again.out, options.out)]
    assert starts[0].keys() == starts[1].keys() != set()
    assert all(torch.equal(tensor, starts[1][name]) for name, tensor in starts[0].items())


def test_a_run_that_died_after_its_last_checkpoint_makes_its_summary(language, texts, tmp_path):
    options = training(language, texts, tmp_path / "run", steps=2)
    before = outcome(train(options))
    names = {path.name for path in options.out.iterdir()}
    for name in names - {"run.json", "start.json", "steps.jsonl", "checkpoint-2"}:
        (options.out / name).unlink()
    assert run([*words(options), "--resume"]) == 0
    assert outcome(options.out) == before
    assert {path.name for path in options.out.iterdir()} == names


@pytest.fixture(scope="module")
def undisturbed(language, texts, tmp_path_factory):
    """A run of three steps, each saved."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    return train(training(language, texts, out, steps=3, save_every=1, keep=3))


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


no_digests = without("qsvd_files.json")


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(without("optimizer.pt"), id="no optimizer"),
        pytest.param(without("qsvd_adapter.json"), id="no record"),
        pytest.param(unfinished, id="unfinished"),
        pytest.param(torn, id="torn line"),
        pytest.param(untold, id="no line"),
        pytest.param(of_another_run, id="a line of another run"),
        pytest.param(nothing_saved, id="no checkpoint"),
        pytest.param(flipped("optimizer.pt"), id="other optimizer"),
        pytest.param(flipped("qsvd_adapter.safetensors"), id="other parameters"),
        pytest.param(no_digests, id="no digests"),
    ],
)
def test_what_a_kill_or_a_disk_leaves_behind_is_passed_over(language, texts, undisturbed, tmp_path, damage, capsys):
    """The run was killed after its second step, and some damage was done."""
    options = training(language, texts, tmp_path / "run", steps=3, save_every=1, keep=3)
    options.out.mkdir()
    for name in ("run.json", "start.json", "steps.jsonl"):
        shutil.copyfile(undisturbed / name, options.out / name)
    for number in (1, 2):
        shutil.copytree(undisturbed / f"checkpoint-{number}", options.out / f"checkpoint-{number}")
    damage(options.out)
    assert run([*words(options), "--resume"]) == 0
    assert outcome(options.out) == outcome(undisturbed)
    told = "checkpoint-2" in capsys.readouterr().err
    assert told == (damage not in (unfinished, torn, nothing_saved))


def test_a_run_whose_checkpoints_are_all_damaged_says_so(language, texts, undisturbed, tmp_path, capsys):
    options = training(language, texts, tmp_path / "run", steps=3, save_every=1, keep=3)
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


@pytest.mark.slow
def test_an_interrupted_process_saves_its_step_ends_with_130_and_goes_on(language, texts, tmp_path):
    options = training(language, texts, tmp_path / "run", steps=20)
    line = words(options)
    process = start(*line, cwd=tmp_path)
    wait_for(lambda: (options.out / "steps.jsonl").is_file() and len(steps_of(options.out)) > 1, process)
    process.send_signal(signal.SIGINT)
    code, out, err = finished(process)
    done = len(steps_of(options.out))
    assert code == 130
    assert out == ""
    assert "stopping after this step; press Ctrl-C again to stop at once" in err
    assert err.endswith(f"the same command continues in {options.out}\n")
    assert [path.name for path in checkpoints(options.out)] == [f"checkpoint-{done}"]
    assert 1 < done < 20
    assert run([*line, "--resume"]) == 0
    assert outcome(train(training(language, texts, tmp_path / "alone", steps=20))) == outcome(options.out)
