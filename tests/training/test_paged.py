"""Runs whose frozen weights visit: the bytes of a run in which they stay, stopped and resumed too."""

import os
import shutil
from dataclasses import replace

import pytest

import qsvd
from qsvd.cli import run
from qsvd.commands.demo import MODEL
from qsvd.commands.train import train
from qsvd.errors import DoesNotFit
from qsvd.prepare.train import prepare_train
from qsvd.training.run_folder import RunFolder
from tests.runs import interrupting, outcome, text_rows, training, words, write_rows


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The embedded model, of four blocks."""
    out = tmp_path_factory.mktemp("base") / "out"
    return qsvd.quantize(qsvd.Quantize(str(MODEL), out=out, rank=8, iterations=1, device="cpu"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "texts.jsonl", text_rows())


def options(base, data, out, **changes):
    chosen = {"steps": 3, "accumulate": 2, "held_out": 0.2, "save_every": 2, "learning_rate": 1e-3, "resident": 1.0}
    return training(base, data, out, **(chosen | changes))


@pytest.mark.parametrize(
    ("method", "changes", "shares"),
    [
        ("pissa", {}, (0.5, 0.0)),
        ("lora", {"packing": True}, (0.5,)),
        ("lora", {"layer_major": True}, (0.0,)),
        ("edora", {"gradient_checkpointing": False}, (0.5, 0.0)),
        ("edora", {"layer_major": True}, (0.5,)),
    ],
    ids=str,
)
def test_a_run_ends_in_the_bytes_of_one_whose_weights_stay(base, data, tmp_path, method, changes, shares):
    found = []
    for share in (1.0, *shares):
        out = train(options(base, data, tmp_path / str(share), resident=share, method=method, **changes))
        found.append(outcome(out))
    assert all(one == found[0] for one in found)


def test_a_run_that_was_stopped_goes_on_with_another_share(base, data, tmp_path, monkeypatch):
    alone = outcome(train(options(base, data, tmp_path / "alone")))
    stopped = options(base, data, tmp_path / "stopped", resident=0.0)
    interrupting(monkeypatch, 1)
    assert run(words(stopped)) == 130
    monkeypatch.undo()
    assert run([*words(replace(stopped, resident=0.5)), "--resume"]) == 0
    assert outcome(stopped.out) == alone


def test_auto_takes_less_on_the_device_where_there_is_less(base, data, tmp_path, monkeypatch):
    monkeypatch.setattr("qsvd.prepare.machine.taken_host_memory", lambda: 0)

    def job(**changes):
        return prepare_train(options(base, data, tmp_path / "run", **changes))

    everything, nothing = (job(resident=share).placed.memory.total("host") for share in (1.0, 0.0))
    assert nothing < everything
    assert job(resident="auto", host=f"{everything / 1000}KB").resident == "all 4 blocks"
    less = job(resident="auto", host=f"{(everything - 1) / 1000}KB")
    assert less.resident == "0 of 4 blocks, the others on disk"  # three places would hold three of the four
    with pytest.raises(DoesNotFit):
        job(resident="auto", host=f"{(nothing - 1) / 1000}KB")


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
        ({"layer_major": True, "packing": True}, "--layer-major needs several rows per step"),
        ({"layer_major": True, "gradient_checkpointing": False}, "--layer-major needs gradient checkpointing"),
    ],
)
def test_what_makes_no_sense_is_refused(base, data, tmp_path, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        train(options(base, data, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_shard_that_is_cut_off_during_a_run_ends_it_with_what_is_kept(base, data, tmp_path, monkeypatch, capsys):
    copied = shutil.copytree(base, tmp_path / "base")
    whole = outcome(train(options(base, data, tmp_path / "whole", steps=4)))
    cut = options(copied, data, tmp_path / "cut", steps=4, resident=0.0)
    shard = next(copied.glob("model*.safetensors"))
    add_step = RunFolder.add_step

    def cutting(self, step):
        add_step(self, step)
        if step.number == 3:
            os.truncate(shard, 1000)

    monkeypatch.setattr(RunFolder, "add_step", cutting)
    assert run(words(cut)) == 1
    said = capsys.readouterr().err
    assert f"{shard}: was truncated during the run and ends inside model.layers." in said
    assert "; restore it; checkpoint-2 is kept, and the same command continues from it" in said
    monkeypatch.undo()
    shutil.copyfile(base / shard.name, shard)
    assert run([*words(cut), "--resume"]) == 0
    assert outcome(cut.out) == whole
