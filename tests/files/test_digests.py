"""Digests in safetensors files, judged by the file as the safetensors library and NumPy see it."""

import json
import os
import struct

import numpy
import pytest
import safetensors.numpy
import torch
import xxhash

from qsvd.errors import Damaged
from qsvd.files.readers import PageReader
from qsvd.files.safetensors import NewTensor, new_tensors, read_header, read_tensor, write_stream

TENSORS = {
    "a": torch.arange(6.0).view(2, 3),
    "b": torch.ones(5, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 4),
    "é": torch.arange(7, dtype=torch.uint8),
}


@pytest.fixture
def path(tmp_path):
    write_stream(tmp_path / "t.safetensors", new_tensors(TENSORS), {"format": "pt", "told": 'a "quoted" \\ text'})
    return tmp_path / "t.safetensors"


def header_of(path):
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return content[8 : 8 + length], content[8 + length :]


def read_all(path):
    return {name: read_tensor(entry) for name, entry in read_header(path).tensors.items()}


def test_the_digests_are_xxh3_of_the_header_without_its_own_and_of_each_tensor_in_order(path):
    raw, data = header_of(path)
    table = json.loads(raw)
    text = table.pop("__metadata__")["qsvd_digests"]
    found = [text[start : start + 32] for start in range(0, len(text), 32)]
    places = sorted(fields["data_offsets"] for fields in table.values())
    assert found[1:] == [xxhash.xxh3_128(data[begin:end]).hexdigest() for begin, end in places]
    assert found[0] == xxhash.xxh3_128(raw.replace(found[0].encode(), b"0" * 32)).hexdigest()


def test_every_flipped_bit_of_a_file_is_found(path):
    content = path.read_bytes()
    missed = []
    for place in range(len(content)):
        broken = bytearray(content)
        broken[place] ^= 1 << place % 8
        path.write_bytes(broken)
        try:
            read_header(path, needs_digests=True)
            read_all(path)
        except ValueError:
            continue
        missed.append(place)
    padding = len(header_of(path)[0]) - len(header_of(path)[0].rstrip())
    assert (missed, padding) == ([], padding)


@pytest.mark.parametrize("name", ["a", "b", "é"])
def test_a_damaged_tensor_is_named_and_the_others_are_read(path, name):
    entry = read_header(path).tensors[name]
    content = bytearray(path.read_bytes())
    content[entry.start + entry.num_bytes // 2] ^= 64
    path.write_bytes(content)
    found = read_header(path).tensors
    for other, tensor in TENSORS.items():
        if other != name:
            assert torch.equal(read_tensor(found[other]), tensor)
    sentence = f"{path} is damaged at {name}: its digest differs; copy it again"
    with pytest.raises(Damaged, match=f"^{sentence}$"):
        read_tensor(found[name])
    target = path.with_name("copy.safetensors")
    with pytest.raises(Damaged, match=f"^{sentence}$"):  # also where it is copied from file to file
        write_stream(target, [NewTensor("x", entry.dtype, entry.shape, found[name])], {})
    assert not target.exists()


def test_a_damaged_page_is_found_when_it_is_read_first(path):
    entry = read_header(path).tensors["a"]
    out = torch.zeros(entry.num_bytes, dtype=torch.uint8)
    reader = PageReader([{0: entry}])
    reader.read_into(0, out)
    assert torch.equal(out.view(torch.float32).view(2, 3), TENSORS["a"])
    content = bytearray(path.read_bytes())
    content[entry.start] ^= 1
    path.write_bytes(content)
    with pytest.raises(Damaged, match="is damaged at a"):
        PageReader([{0: entry}]).read_into(0, out)


def test_rows_of_a_tensor_are_read_without_a_digest_and_all_rows_with_it(path):
    entry = read_header(path).tensors["a"]
    assert torch.equal(read_tensor(entry.rows(1, 2)), TENSORS["a"][1:])
    assert entry.rows(1, 2).digest == ""
    assert entry.rows(0, 2) == entry


def test_a_file_that_lost_its_digests_is_refused_where_they_are_needed(path):
    content = path.read_bytes()
    path.write_bytes(content.replace(b"qsvd_digests", b"qsvd_digestz"))
    assert read_header(path).digest == ""
    with pytest.raises(Damaged, match="has lost its digests"):
        read_header(path, needs_digests=True)


def test_a_file_of_others_that_changes_after_it_was_opened_is_not_read(tmp_path):
    path = tmp_path / "theirs.safetensors"
    safetensors.numpy.save_file({"a": numpy.ones(4, numpy.float32)}, path)
    entry = read_header(path).tensors["a"]
    assert torch.equal(read_tensor(entry), torch.ones(4))
    safetensors.numpy.save_file({"a": numpy.zeros(4, numpy.float32)}, path)
    os.utime(path, ns=(0, entry.stamp[1] + 1))  # the clock of a file system has steps of some ms
    with pytest.raises(Damaged, match="was changed after this command opened it"):
        read_tensor(entry)
