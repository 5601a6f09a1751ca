"""Experts that are quantized and trained, killed in between and resumed: the bytes of a run that was left alone."""

from functools import partial

import pytest

import qsvd
from qsvd.commands.train import train
from qsvd.decompose.alternate import STACK
from qsvd.files.quantize_folder import OutputFolder
from qsvd.training.run_folder import RunFolder
from tests.checkpoints import write_checkpoint, write_tokenizer
from tests.commands.folders import files_of
from tests.runs import outcome, text_rows, training, write_rows
from tests.stops import killed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),  # Python 3.12
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Two blocks, the second with four experts and a shared one, and the tokenizer of the embedded model."""
    folder = tmp_path_factory.mktemp("experts") / "source"
    write_checkpoint(folder, "Glm4MoeForCausalLM", vocab_size=4096)
    write_tokenizer(folder)
    return folder


def quantize(source):
    options = {"rank": 4, "expert_rank": 2, "iterations": 1, "shard_size": "100KB", "device": "cpu"}
    return qsvd.quantize(source, out="out", **options).path


def train_experts(data, out):
    return train(training("out", data, out, steps=2, warmup=0.0, save_every=1, train_experts=True, any_start=True))


def test_killed_runs_go_on_to_the_same_bytes(source, tmp_path, monkeypatch):
    monkeypatch.setitem(STACK, "cpu", 3 * 64 * 64)  # three experts together, as on a GPU
    data = write_rows(tmp_path / "texts.jsonl", text_rows())
    alone, again = tmp_path / "alone", tmp_path / "killed"
    for folder in (alone, again):
        folder.mkdir()
        monkeypatch.chdir(folder)  # folders are named in the files
        if folder == again:  # between the two files of the second of three experts
            killed(monkeypatch, OutputFolder, "save_factors", 13, partial(quantize, source))
            assert (folder / "out" / "unfinished").is_dir()
        quantize(source)
        if folder == again:
            killed(monkeypatch, RunFolder, "add_step", 2, partial(train_experts, data, folder / "run"))
        train_experts(data, folder / "run")
    assert len([*alone.glob("out/model-*.safetensors")]) > 2
    assert files_of(again / "out") == files_of(alone / "out")
    found = outcome(alone / "run")
    assert outcome(again / "run") == found
    assert b"experts.down_proj.3" in found[0]
