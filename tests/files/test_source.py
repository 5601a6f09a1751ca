"""Opening and reading checkpoints that transformers and torch wrote, whole ones and damaged ones."""

import hashlib
import json
import os
import shutil
import socket

import huggingface_hub
import numpy
import pytest
import safetensors.torch
import torch
import transformers

from qsvd.files.safetensors import read_header
from qsvd.files.source import open_checkpoint
from qsvd.plan.weights import Source, WeightSpec
from tests.checkpoints import SHARED_MODELS, write_checkpoint

SHARDED = {"max_shard_size": "8KB"}


def shards_of(folder):
    return sorted(path for path in folder.glob("model-*.safetensors"))


@pytest.mark.parametrize("options", [{}, SHARDED], ids=["single", "sharded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_tensor_is_read_to_the_bit(tmp_path, dtype, options):
    stored = write_checkpoint(tmp_path, dtype=dtype, **options).state_dict()
    assert len(shards_of(tmp_path)) > 2 or not options
    checkpoint = open_checkpoint(str(tmp_path))
    assert (checkpoint.name, checkpoint.folder, checkpoint.revision) == (str(tmp_path), tmp_path, None)
    assert checkpoint.tensors.keys() == stored.keys()
    for name, tensor in stored.items():
        assert checkpoint.read(name).dtype == dtype
        assert torch.equal(checkpoint.read(name), tensor)


def test_the_config_is_that_of_transformers(tmp_path):
    write_checkpoint(tmp_path, "GemmaForCausalLM")
    ours, theirs = open_checkpoint(str(tmp_path)).config, transformers.AutoConfig.from_pretrained(tmp_path)
    assert (type(ours), ours.to_dict()) == (type(theirs), theirs.to_dict())


def test_a_local_folder_never_touches_the_network(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    write_checkpoint(tmp_path)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    open_checkpoint(str(tmp_path))


def test_small_files_beside_the_weights_are_listed(tmp_path):
    write_checkpoint(tmp_path, **SHARDED)
    copied = [
        "LICENSE",
        "chat_template.jinja",
        "generation_config.json",
        "merges.txt",
        "spiece.model",
        "tokenizer.json",
    ]
    left = ["README.md", ".hidden.json", "model.onnx", "training_args.bin", "notes.py"]
    for name in (*copied, *left):
        (tmp_path / name).write_text("{}")
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate(50 * 10**6 + 1)
    (tmp_path / "folder.json").mkdir()
    assert [path.name for path in open_checkpoint(str(tmp_path)).other_files] == copied


def test_the_fingerprint_follows_config_headers_and_sizes_only(tmp_path):
    prints = {}
    for name, options in {"a": {}, "again": {}, "dtype": {"dtype": torch.float32}, "sharded": SHARDED}.items():
        write_checkpoint(tmp_path / name, **options)
        prints[name] = open_checkpoint(str(tmp_path / name)).fingerprint
    (tmp_path / "a" / "README.md").write_text("words")
    assert open_checkpoint(str(tmp_path / "a")).fingerprint == prints["a"] == prints["again"]
    config = tmp_path / "a" / "config.json"
    config.write_text(config.read_text() + "\n")
    prints["config"] = open_checkpoint(str(tmp_path / "a")).fingerprint
    del prints["again"]
    assert len(set(prints.values())) == len(prints)
    assert all(len(bytes.fromhex(digest)) == 32 for digest in prints.values())


def test_the_fingerprint_is_this_hash(tmp_path):
    write_checkpoint(tmp_path, **SHARDED)
    digest = hashlib.sha256((tmp_path / "config.json").read_bytes())
    for path in shards_of(tmp_path):
        content = path.read_bytes()
        header = content[8 : 8 + int.from_bytes(content[:8], "little")]
        last = max(len(content) - 4096, 0)
        sample = b"".join(content[number * last // 63 :][:4096] for number in range(64))
        digest.update(f"\n{path.name} {len(content)}\n".encode() + header + sample)
    assert open_checkpoint(str(tmp_path)).fingerprint == digest.hexdigest()


def test_a_file_instead_of_a_folder_is_refused(tmp_path):
    write_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"model\.safetensors' is a file; give the folder"):
        open_checkpoint(str(tmp_path / "model.safetensors"))


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json in .*; give the folder of a transformers model"):
        open_checkpoint(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no config\.json in .*; this is an adapter of PEFT: give its base model"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{oops", r"config\.json is not valid JSON"),
        ("[]", r"config\.json is a JSON list, not an object"),
        ('{"model_type": "alien"}', r"transformers cannot read .*config\.json: .*alien"),
        ("{}", r"transformers cannot read .*config\.json: "),
        ('{"model_type": "llama", "hidden_size": "wide"}', r"cannot read .*config\.json: .*'hidden_size': .* got str"),
    ],
)
def test_a_config_that_is_none_is_refused(tmp_path, text, message):
    write_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(str(tmp_path))


def test_a_folder_without_weights_is_refused(tmp_path):
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "consolidated.safetensors")
    with pytest.raises(
        ValueError, match=r"no weights in .*: neither model\.safetensors .* only consolidated\.safetensors"
    ):
        open_checkpoint(str(tmp_path))


def test_gguf_is_refused(tmp_path):
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"holds GGUF files \(model-Q4_K_M\.gguf\), .* give the 16-bit"):
        open_checkpoint(str(tmp_path))


def test_missing_shards_are_all_named(tmp_path):
    write_checkpoint(tmp_path, **SHARDED)
    shards = shards_of(tmp_path)
    for path in shards[1:3]:
        path.unlink()
    named = ", ".join(path.name for path in shards[1:3])
    with pytest.raises(ValueError, match=rf"2 of {len(shards)} shards of .* are missing: {named}$"):
        open_checkpoint(str(tmp_path))


def test_damaged_shards_are_all_named(tmp_path):
    write_checkpoint(tmp_path, **SHARDED)
    first, second = shards_of(tmp_path)[:2]
    os.truncate(first, first.stat().st_size - 6)
    second.write_bytes(b"<html>not found</html>")
    with pytest.raises(
        ValueError, match=rf"{first.name} is truncated: 6 of .*; .*{second.name} is truncated or not a safe"
    ):
        open_checkpoint(str(tmp_path))


def test_many_damaged_shards_are_counted(tmp_path):
    write_checkpoint(tmp_path, **SHARDED)
    for path in shards_of(tmp_path)[:7]:
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"; and 2 more$"):
        open_checkpoint(str(tmp_path))


def test_a_tensor_that_only_the_index_has_is_refused(tmp_path):
    write_checkpoint(tmp_path, **SHARDED)
    index = tmp_path / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"]["ghost"] = shards_of(tmp_path)[0].name
    index.write_text(json.dumps(table))
    with pytest.raises(ValueError, match=r"promises 1 tensors that its shards lack: ghost \(model-00001"):
        open_checkpoint(str(tmp_path))


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    write_checkpoint(tmp_path, **SHARDED)
    first, second = shards_of(tmp_path)[:2]
    shutil.copy(first, second)
    with pytest.raises(ValueError, match=rf"{second.name} repeats tensors of another shard: "):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not valid JSON"), ("{}", "has no weight_map"), ('{"weight_map": {"a": 1}}', "has no weight_map")],
)
def test_an_index_that_is_none_is_refused(tmp_path, text, message):
    write_checkpoint(tmp_path, **SHARDED)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=rf"index\.json {message}"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize(("name", "other_files"), [("minilm-l6", 4), ("stories260K", 3)])
def test_real_models_are_read_as_transformers_reads_them(name, other_files):
    folder = SHARED_MODELS / name
    if not folder.is_dir():
        pytest.skip(f"{name} is not beside this checkout")
    checkpoint = open_checkpoint(str(folder))
    assert len(checkpoint.other_files) == other_files
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    assert checkpoint.tensors.keys() == stored.keys()
    assert all(torch.equal(checkpoint.read(tensor), stored[tensor]) for tensor in list(stored)[::10])


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_weight_is_read_from_rows_and_from_the_matrices_of_a_stack(tmp_path, file):
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    tensors = {"fused": torch.rand(6, 5, dtype=torch.bfloat16), "stack": torch.rand(3, 4, 5, dtype=torch.bfloat16)}
    save = safetensors.torch.save_file if file.endswith("safetensors") else torch.save
    save(tensors, tmp_path / file)
    checkpoint = open_checkpoint(str(tmp_path))

    def read(rows, *sources):
        weight = checkpoint.read_weight(WeightSpec("fused", "m", (rows, 5), "other", 0, sources))
        assert weight.is_contiguous()
        return weight.float().numpy()

    fused, stack = (tensor.float().numpy() for tensor in tensors.values())
    assert (read(6) == fused).all()
    assert (read(3, Source("fused", rows=(2, 5))) == fused[2:5]).all()
    assert (read(4, Source("stack", index=1)) == stack[1]).all()
    assert (read(3, Source("stack", index=2, rows=(0, 3))) == stack[2, :3]).all()
    parts = (Source("stack", index=0), Source("fused", rows=(5, 6)))
    assert (read(5, *parts) == numpy.concatenate([stack[0], fused[5:]])).all()


@pytest.mark.parametrize("rows", [(0, 7), (3, 3), (-1, 2)])
def test_rows_outside_the_tensor_are_refused(tmp_path, rows):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"w": torch.ones(6, 5)}, path)
    with pytest.raises(ValueError, match=rf"w \[6, 5\] has no rows {rows[0]} to {rows[1] - 1}"):
        read_header(path).tensors["w"].rows(*rows)
