"""Runs whose frozen weights visit, or that keep activations: the bytes of one that does not; resumed ones too."""

import json
import os
import shutil
from dataclasses import replace
from functools import partial

import pytest

import qsvd
from qsvd.adapters.adapter import AdapterOptions
from qsvd.adapters.model import trained
from qsvd.cli import run
from qsvd.commands.train import train
from qsvd.errors import DoesNotFit
from qsvd.memory.items import Placement
from qsvd.prepare.quantize_first import prepare_training
from qsvd.prepare.train import prepare_train
from qsvd.training.run_folder import RunFolder
from tests.checkpoints import tiny_config
from tests.drawn import drawn_base
from tests.runs import (
    TRAINED,
    interrupting,
    outcome,
    sequences,
    settings,
    text_rows,
    trainer,
    training,
    words,
    write_rows,
)
from tests.sealed import opened

SHAPE = {"vocab_size": 4096, "num_hidden_layers": 4}  # the tokenizer is that of the embedded model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Four random blocks."""
    return drawn_base(tmp_path_factory.mktemp("base") / "out", tiny_config("LlamaForCausalLM", **SHAPE), 8)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "texts.jsonl", text_rows())


def options(base, data, out, **changes):
    chosen = {"steps": 3, "accumulate": 2, "held_out": 0.2, "save_every": 2, "learning_rate": 1e-3, "resident": 1.0}
    chosen["any_start"] = True  # a random model
    return training(base, data, out, **(chosen | changes))


@pytest.fixture(scope="module")
def alone(base, data, tmp_path_factory):
    """What a run makes whose weights stay and whose activations are kept."""
    return outcome(train(options(base, data, tmp_path_factory.mktemp("alone") / "run")))


def test_steps_end_in_the_bytes_of_those_with_weights_that_stay(base, tmp_path):
    """Packed and layer-major; without either: tests/adapters/test_page_cache.py."""
    chosen = {"steps": 2, "accumulate": 2, "save_every": 2, "gradient_checkpointing": True, "layer_major": True}
    chosen |= {"packing": True, "max_length": 40, "batch_size": 1}
    found = []
    for number in (4, 0):
        run, place = tmp_path / str(number), Placement(number, "disk")
        load = {"options": AdapterOptions("edora"), "placement": place}
        made = trainer(base, run, sequences(), settings(**chosen), **load)
        made.train()
        losses = [step["loss"] for step in made.state.log_history if "loss" in step]
        found.append(((run / "checkpoint-2" / TRAINED).read_bytes(), losses))
    assert len(found[0][1]) == 2
    assert found[0] == found[1]


def test_auto_takes_less_on_the_device_where_there_is_less(base, data, tmp_path, monkeypatch):
    monkeypatch.setattr("qsvd.prepare.machine.taken_host_memory", lambda: 0)

    def job(**changes):
        return prepare_train(options(base, data, tmp_path / "run", gradient_checkpointing="yes", **changes))

    everything, nothing = (job(resident=share).placed.memory.total("host") for share in (1.0, 0.0))
    assert nothing < everything
    assert job(resident="auto", host=f"{everything / 1000}KB").resident == "all 4 blocks"
    less = job(resident="auto", host=f"{(everything - 1) / 1000}KB")
    assert less.resident == "0 of 4 blocks, the others on disk"  # three places would hold three of the four
    with pytest.raises(DoesNotFit):
        job(resident="auto", host=f"{(nothing - 1) / 1000}KB")


class Gradients:
    """Copies them as they come from the backward pass."""

    @classmethod
    def after_backward(cls, model, step):
        assert step == 1
        cls.found = {name: p.grad.clone() for name, p in trained(model).items()}


def note(calls, number, *_):
    calls.append(number)


def test_kept_activations_change_no_bit_of_a_step_and_only_the_first_blocks_run_again(base, tmp_path):
    options = AdapterOptions("lora", rank=4, dropout=0.1)
    found = []
    for is_on, kept, times in ((True, 0, [2, 2, 2, 2]), (True, 3, [2, 1, 1, 1]), (False, 4, [1, 1, 1, 1])):
        chosen = settings(gradient_checkpointing=is_on, unrecomputed=kept)
        made = trainer(base, tmp_path, sequences(), chosen, Gradients, options=options)
        calls = []
        for number, layer in enumerate(made.model.model.layers):
            layer.mlp.up_proj.register_forward_hook(partial(note, calls, number))
        made.train()
        assert [calls.count(number) for number in range(4)] == times
        found.append((made.state.log_history[0]["loss"], Gradients.found))
    assert all(loss == found[0][0] for loss, _ in found)
    for name, gradient in found[0][1].items():
        assert all(gradients[name].equal(gradient) for _, gradients in found), name


def test_a_run_goes_on_with_as_many_kept_activations_as_it_began_with(base, data, alone, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("qsvd.prepare.machine.taken_host_memory", lambda: 0)
    run_options = options(base, data, tmp_path / "run")

    def job(**changes):
        return prepare_train(replace(run_options, **changes))

    least, most = (job(gradient_checkpointing=word).placed.memory.total("host") for word in ("yes", "no"))
    assert job(host=f"{3 * most / 1000}KB").activations == "activations of all 4 blocks are kept"
    some = f"{(least + most) / 1000}KB"  # of which a run on a CPU takes half
    kept = job(host=some).placed.placement.unrecomputed
    assert 0 < kept < 4
    interrupting(monkeypatch, 1)
    assert run(words(replace(run_options, host=some))) == 130
    assert f"activations of {kept} of 4 blocks are kept, {4 - kept} are recomputed" in capsys.readouterr().err
    assert job(host=f"{3 * most / 1000}KB").placed.placement.unrecomputed == kept
    assert job(gradient_checkpointing="yes").placed.placement.unrecomputed == 0
    with pytest.raises(DoesNotFit, match=f"activations of {kept} of 4 blocks so far, and would fit with --gradient-ch"):
        job(host=f"{(least + 1) / 1000}KB")
    monkeypatch.undo()
    qsvd.train(run_options)
    assert (
        f"of {kept} of 4 blocks are kept" in json.loads((run_options.out / "summary.json").read_text())["activations"]
    )
    assert outcome(run_options.out) == alone


def test_a_run_of_an_older_version_goes_on(base, data, tmp_path, monkeypatch):
    begun = options(base, data, tmp_path / "run", gradient_checkpointing=True)
    interrupting(monkeypatch, 1)
    assert run(words(begun)) == 130
    path = begun.out / "run.json"
    known = opened(path)
    assert (known.pop("blocks_with_activations"), known.pop("format")) == (0, 4)
    for word, now in ((True, "auto"), (False, False)):  # the default was True
        path.write_text(json.dumps(known | {"gradient_checkpointing": word}))
        same = prepare_training(replace(begun, gradient_checkpointing=now))
        assert same.placed.placement.unrecomputed == 0
        assert same.settings.gradient_checkpointing is word


def test_what_cannot_fit_is_refused_before_anything_is_loaded(base, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("qsvd.commands.train.load_start", None)
    small = options(base, data, tmp_path / "run", host="1MB")
    with pytest.raises(DoesNotFit, match=r"the run needs [\d.]+ MB of CPU memory, where 0 bytes may be used; "):
        train(small)
    assert run(words(small)) == 3
    assert "the run needs" in capsys.readouterr().err
    assert not small.out.exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"gpu": "24GB"}, "--gpu 24GB needs a GPU, and the device is cpu"),
        ({"host": "64X"}, "--host '64X' is not a size: give a number of GB, or one and KB, MB, GB or TB"),
        ({"resident": 1.5}, "--resident 1.5 is neither auto nor a number from 0 to 1"),
        ({"layer_major": True, "gradient_checkpointing": False}, "--layer-major needs gradient checkpointing"),
    ],
)
def test_what_makes_no_sense_is_refused(base, data, tmp_path, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        train(options(base, data, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_shard_that_is_cut_off_during_a_run_ends_it_with_what_is_kept(
    base, data, alone, tmp_path, monkeypatch, capsys
):
    copied = shutil.copytree(base, tmp_path / "base")
    cut = options(copied, data, tmp_path / "cut", resident=0.0)
    shard = next(copied.glob("model*.safetensors"))
    add_step = RunFolder.add_step

    def cutting(self, step):
        add_step(self, step)
        if step.number == 2:
            os.truncate(shard, 1000)

    monkeypatch.setattr(RunFolder, "add_step", cutting)
    assert run(words(cut)) == 1
    said = capsys.readouterr().err
    assert f"{shard}: was truncated during the run and ends inside model.layers." in said
    assert "; restore it; checkpoint-2 is kept, and the same command continues from it" in said
    monkeypatch.undo()
    shutil.copyfile(base / shard.name, shard)
    assert run([*words(replace(cut, resident=0.5)), "--resume"]) == 0  # with another share
    assert outcome(cut.out) == alone
