"""The files of a 16-bit model that change while it is quantized, or before its run continues."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import safetensors.torch
import torch
import xxhash

import qsvd
from qsvd.commands.demo import MODEL
from qsvd.commands.quantize import quantize
from qsvd.files.safetensors import read_header
from qsvd.files.source import SAMPLE_BYTES, SAMPLES
from tests.commands.folders import files_of

DONE = 3
NAMES = [f"model.layers.0.self_attn.{letter}_proj" for letter in "qkvo"]


@pytest.fixture
def source(tmp_path):
    """A model whose file is larger than what its fingerprint samples."""
    folder = tmp_path / "source"
    folder.mkdir()
    for path in MODEL.glob("*.json"):
        shutil.copyfile(path, folder / path.name)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    tensors = safetensors.torch.load_file(MODEL / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".layers." not in name or ".layers.0." in name}
    safetensors.torch.save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def options_of(source, out):
    return qsvd.Quantize(str(source), out=out, rank=2, iterations=1, include=tuple(NAMES), device="cpu")


def stop_at(count, act=None):
    """A way to show progress that stops, or acts, after so many weights."""

    def show(progress):
        if progress.what == f"{count}/{len(NAMES)} weights":
            if act is None:
                raise KeyboardInterrupt
            act()

    return show


def between_samples(path, start, end):
    """An offset in a part of the file that no sample has."""
    size = path.stat().st_size
    sampled = [number * (size - SAMPLE_BYTES) // (SAMPLES - 1) for number in range(SAMPLES)]
    return next(at for at in range(start, end) if all(not -1 <= at - first <= SAMPLE_BYTES for first in sampled))


def flip(path, name):
    entry = read_header(path).tensors[name]
    at = between_samples(path, entry.start, entry.start + entry.num_bytes)
    with path.open("rb+") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))


def test_a_model_with_other_times_and_the_same_bytes_is_gone_on_with(source, tmp_path):
    alone = files_of(quantize(options_of(source, tmp_path / "alone")).path)
    options = options_of(source, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        quantize(options, stop_at(DONE))
    os.utime(source / "model.safetensors", ns=(0, 5))
    assert files_of(quantize(options).path).keys() == alone.keys()
    found = json.loads((options.out / "qsvd.json").read_text())["weights"]
    weights = safetensors.torch.load_file(source / "model.safetensors")
    for name, weight in found.items():
        raw = weights[name].contiguous().view(torch.uint8).numpy().tobytes()
        assert weight["source_digest"] == xxhash.xxh3_128(raw).hexdigest()
    same = {name: content for name, content in files_of(options.out).items() if name != "README.md"}
    assert same == {name: content for name, content in alone.items() if name != "README.md"}  # it names the folder


def test_a_finished_weight_that_is_another_now_ends_the_run(source, tmp_path):
    options = options_of(source, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        quantize(options, stop_at(DONE))
    flip(source / "model.safetensors", f"{NAMES[0]}.weight")
    said = rf"source changed after .*out was begun: {NAMES[0]}.weight are different now; restore the files"
    for _ in range(2):
        with pytest.raises(qsvd.BadInput, match=said):
            quantize(options)
    flip(source / "model.safetensors", f"{NAMES[0]}.weight")  # restored
    quantize(options)


def test_a_tokenizer_that_is_another_now_ends_the_run(source, tmp_path):
    options = options_of(source, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        quantize(options, stop_at(1))
    (source / "tokenizer_config.json").write_text("{}")
    with pytest.raises(qsvd.BadInput, match=r"was begun: tokenizer_config.json are different now"):
        quantize(options)


def test_a_finished_shard_that_is_damaged_is_written_again(source, tmp_path, caplog):
    options = replace(options_of(source, tmp_path / "out"), shard_size="200KB")
    alone = quantize(replace(options, out=tmp_path / "alone")).path
    with pytest.raises(KeyboardInterrupt):
        quantize(options, stop_at(DONE))
    shards = sorted(options.out.glob("model-*.safetensors"))
    assert shards
    content = bytearray(shards[0].read_bytes())
    content[-1] ^= 1
    shards[0].write_bytes(content)
    quantize(options)
    assert f"{shards[0]} is damaged at " in caplog.text
    assert files_of(options.out).keys() == files_of(alone).keys()
    assert all((options.out / path.name).read_bytes() == path.read_bytes() for path in alone.glob("*.safetensors"))
    shards[0].write_bytes(content)
    with pytest.raises(qsvd.BadInput, match=r"is damaged|differ from what"):
        qsvd.load(options.out)


def test_a_file_that_is_changed_during_the_run_is_noticed(source, tmp_path):
    options = options_of(source, tmp_path / "out")
    path = source / "model.safetensors"
    with pytest.raises(qsvd.BadInput, match=r"model.safetensors was changed after this command opened it"):
        quantize(options, stop_at(1, lambda: flip(path, "model.embed_tokens.weight")))
    assert not (options.out / "qsvd.json").exists()
