"""The format, judged by the safetensors library, and files broken on purpose."""

import json
import math
import os
import tempfile
import weakref
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from qsvd.files.safetensors import DIGESTS, NewTensor, TensorEntry, read_header, read_tensor, write_stream

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
DRAWN = st.dictionaries(
    st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(list(DTYPES)), SHAPES),
    max_size=6,
)


def random_tensor(dtype, shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if dtype == "BOOL":
        return torch.randint(0, 2, shape, generator=generator).bool()
    flat = torch.randint(0, 256, (math.prod(shape) * DTYPES[dtype].itemsize,), generator=generator, dtype=torch.uint8)
    return flat.view(DTYPES[dtype]).reshape(shape)


def tensors_of(drawn):
    return {name: random_tensor(dtype, shape, i) for i, (name, (dtype, shape)) in enumerate(drawn.items())}


def assert_same_bits(one, other):
    assert (one.dtype, one.shape) == (other.dtype, other.shape)
    assert torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def to_write(tensors):
    names = {dtype: name for name, dtype in DTYPES.items()}
    return [NewTensor(name, names[t.dtype], tuple(t.shape), t) for name, t in tensors.items()]


def write_raw(path, header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


@settings(deadline=None, max_examples=60)
@given(DRAWN, st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3))
def test_the_library_reads_what_we_write(drawn, metadata):
    tensors = tensors_of(drawn)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        write_stream(path, to_write(tensors), metadata)
        loaded = safetensors.torch.load_file(path)
        with safetensors.safe_open(path, "pt") as file:
            assert file.metadata() == metadata | {DIGESTS: file.metadata()[DIGESTS]}
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert_same_bits(loaded[name], tensor)


@settings(deadline=None, max_examples=60)
@given(DRAWN)
def test_we_read_what_the_library_writes(drawn):
    tensors = tensors_of(drawn)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
        header = read_header(path)
        assert header.metadata == {"format": "pt"}
        assert header.tensors.keys() == tensors.keys()
        for name, (dtype, shape) in drawn.items():
            entry = header.tensors[name]
            assert (entry.name, entry.dtype, entry.shape, entry.file) == (name, dtype, shape, path)
            assert_same_bits(read_tensor(entry), tensors[name])


def test_the_bytes_are_these(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = {"b": torch.tensor([1, 2], dtype=torch.uint8), "z": torch.tensor(1.0), "a": torch.tensor([[3]]).byte()}
    write_stream(path, to_write(tensors), {"format": "pt"})
    values = [b"\x00\x00\x80\x3f", b"\x03", b"\x01\x02"]
    digests = "".join(xxhash.xxh3_128(value).hexdigest() for value in values).encode()
    header = (
        b'{"__metadata__":{"qsvd_digests":"HEADER%s","format":"pt"},'
        b'"z":{"dtype":"F32","shape":[],"data_offsets":[0,4]},'
        b'"a":{"dtype":"U8","shape":[1,1],"data_offsets":[4,5]},"b":{"dtype":"U8","shape":[2],"data_offsets":[5,7]}}'
    ) % digests
    cleared = header.replace(b"HEADER", b"0" * 32)
    cleared += b" " * (-len(cleared) % 8)
    padded = cleared.replace(b"0" * 32, xxhash.xxh3_128(cleared).hexdigest().encode(), 1)
    assert path.read_bytes() == len(padded).to_bytes(8, "little") + padded + b"".join(values)


def test_order_and_source_do_not_change_the_bytes(tmp_path):
    tensors = {
        name: random_tensor(dtype, (3, 5), i) for i, (name, dtype) in enumerate(zip("dcba", DTYPES, strict=False))
    }
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    write_stream(first, to_write(tensors), {"a": "1", "b": "2"})
    entries = read_header(first).tensors.values()
    copies = [NewTensor(e.name, e.dtype, e.shape, e) for e in sorted(entries, key=lambda entry: entry.name)]
    write_stream(second, copies, {"b": "2", "a": "1"})
    assert first.read_bytes() == second.read_bytes()


def test_every_tensor_starts_at_a_multiple_of_its_element_size(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = {f"{i}": random_tensor(dtype, (3,)) for i, dtype in enumerate(DTYPES)}
    write_stream(path, to_write(tensors), {})
    assert all(entry.start % DTYPES[entry.dtype].itemsize == 0 for entry in read_header(path).tensors.values())


def test_a_tensor_longer_than_a_chunk_is_copied_whole(tmp_path):
    big = torch.arange(3 * 2**20 + 7, dtype=torch.int32)  # 12 MiB and 28 bytes; a chunk has 8 MiB
    source, target = tmp_path / "source.safetensors", tmp_path / "target.safetensors"
    safetensors.torch.save_file({"big": big}, source)
    entry = read_header(source).tensors["big"]
    write_stream(target, [NewTensor("renamed", entry.dtype, entry.shape, entry)], {})
    assert torch.equal(safetensors.torch.load_file(target)["renamed"], big)


def test_a_transposed_tensor_is_written_in_row_major_order(tmp_path):
    matrix = torch.arange(6.0).reshape(2, 3).T
    write_stream(tmp_path / "m", [NewTensor("m", "F32", (3, 2), matrix)], {})
    assert torch.equal(safetensors.torch.load_file(tmp_path / "m")["m"], torch.tensor([[0.0, 3], [1, 4], [2, 5]]))


def entry_of(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"[]", b"", "its header is a JSON list, not an object"),
        (b"{oops", b"", "its header is not valid JSON"),
        (b"\xff\xfe", b"", "its header is not valid JSON"),
        (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}', b"", "a name comes twice"),
        ({"__metadata__": {"a": 1}}, b"", "__metadata__ must map strings to strings"),
        ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), "a lacks a valid dtype, shape or data_offsets"),
        ({"a": entry_of(shape=(-2,))}, bytes(8), "a lacks a valid dtype, shape or data_offsets"),
        ({"a": entry_of(dtype="Q4")}, bytes(8), "a has the unknown dtype 'Q4'; known are F64, F32"),
        ({"a": entry_of(shape=(3,))}, bytes(8), r"wrong header: a, F32 \[3\], has 8 bytes, not 12"),
        ({"a": entry_of(), "b": entry_of(offsets=(4, 12))}, bytes(12), r"wrong header: b \(overlaps the previous\)"),
        ({"a": entry_of(), "b": entry_of(offsets=(9, 17))}, bytes(17), r"wrong header: b \(leaves a gap after the"),
        ({"a": entry_of(offsets=(-4, 4))}, bytes(4), r"wrong header: a \(overlaps"),
        ({"a": entry_of()}, bytes(5), r"truncated: 3 of \d+ bytes are missing"),
        ({"a": entry_of()}, bytes(10), "2 bytes follow the last tensor"),
    ],
)
def test_a_wrong_header_is_refused(tmp_path, header, data, message):
    path = write_raw(tmp_path / "broken.safetensors", header, data)
    with pytest.raises(ValueError, match=rf"broken\.safetensors.*{message}"):
        read_header(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a header starts with 8 bytes, the file has 0"),
        (b"1234567", "a header starts with 8 bytes, the file has 7"),
        ((100).to_bytes(8, "little") + b"{}", "its header should have 100 bytes, the file has 10"),
        (b"\xff" * 20, "its header should have 18446744073709551615 bytes, the file has 20"),
    ],
)
def test_a_file_too_short_for_its_header_is_refused(tmp_path, content, message):
    path = tmp_path / "short.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"short\.safetensors is truncated or not a safetensors file: {message}"):
        read_header(path)


@pytest.mark.parametrize("cut", [1, 1000])
def test_a_file_cut_after_its_header_was_read_is_noticed(tmp_path, cut):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"a": torch.ones(300)}, path)
    entry = read_header(path).tensors["a"]
    os.truncate(path, path.stat().st_size - cut)
    with pytest.raises(ValueError, match="was changed after this command opened it"):
        read_tensor(entry)
    target = tmp_path / "target.safetensors"
    target.write_text("what was there before")
    with pytest.raises(ValueError, match="was changed after this command opened it"):
        write_stream(target, [NewTensor("a", "F32", (300,), entry)], {})
    assert target.read_text() == "what was there before"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.safetensors", "target.safetensors"]


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_stream(tmp_path / "model.safetensors", to_write({"a": torch.ones(3)}), {})
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    calls = []
    real_sync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: calls.append(("sync", path.exists())) or real_sync(number))
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append(("rename", path.exists())) or real_replace(a, b))
    write_stream(path, to_write({"a": torch.ones(3)}), {})
    assert calls == [("sync", False), ("rename", False), ("sync", True)]  # the folder last
    assert path.exists()


@pytest.mark.parametrize("names", [["a", "a"], ["__metadata__"]])
def test_names_that_cannot_be_written_are_refused(tmp_path, names):
    new = [NewTensor(name, "F32", (1,), torch.ones(1)) for name in names]
    with pytest.raises(ValueError, match=f"tensor names must be unique and not __metadata__: {names[0]}$"):
        write_stream(tmp_path / "model.safetensors", new, {})


@pytest.mark.parametrize(("dtype", "shape"), [("F16", (2, 3)), ("F32", (6,))])
def test_a_source_of_another_dtype_or_shape_is_refused(tmp_path, dtype, shape):
    for source in (torch.ones(2, 3), TensorEntry("x", "F32", (2, 3), 24, tmp_path / "absent", 0, (0, 0))):
        with pytest.raises(ValueError, match=rf"a is stated as {dtype} .*, but its source is F32 \[2, 3\]"):
            write_stream(tmp_path / "model.safetensors", [NewTensor("a", dtype, shape, source)], {})


def test_a_tensor_is_freed_before_the_next_one_is_made(tmp_path):
    kept = []

    def make():
        assert [values() for values in kept] == [None] * len(kept)
        values = np.ones(8, np.float32)
        kept.append(weakref.ref(values))
        return torch.from_numpy(values)

    write_stream(tmp_path / "a.safetensors", [NewTensor(name, "F32", (8,), make) for name in "abc"], {})
    assert len(kept) == 3
