"""Pages out of files, whatever the system reads at a time and whatever becomes of the files."""

import errno
import os
import random

import pytest
import torch

from qsvd.files.readers import PageReader
from qsvd.files.safetensors import TensorEntry

CONTENT = bytes(random.Random(0).randbytes(5000))
UNTOUCHED = 7


@pytest.fixture
def shards(tmp_path):
    """Two files; the second is the first from its end."""
    (tmp_path / "one").write_bytes(CONTENT)
    (tmp_path / "two").write_bytes(CONTENT[::-1])
    return tmp_path


def piece(file, start, num_bytes):
    return TensorEntry(f"{file.name}.{start}", "U8", (num_bytes,), num_bytes, file, start, (0, 0))


def room(num_bytes):
    return torch.full((num_bytes,), UNTOUCHED, dtype=torch.uint8)


def read(reader, page, num_bytes):
    out = room(num_bytes)
    reader.read_into(page, out)
    return bytes(out.numpy())


def pages(shards):
    one, two = shards / "one", shards / "two"
    return [{0: piece(one, 10, 1000), 1024: b"known", 1280: piece(two, 0, 300)}, {256: piece(two, 4000, 1000)}]


def check(reader):
    gap, back = bytes([UNTOUCHED]), CONTENT[::-1]
    expected = CONTENT[10:1010] + 24 * gap + b"known" + 251 * gap + back[:300] + 20 * gap
    assert read(reader, 0, 1600) == expected
    assert read(reader, 1, 1256) == 256 * gap + back[4000:]


def test_pieces_of_several_files_come_to_their_offsets_and_the_rest_is_left(shards):
    check(PageReader(pages(shards)))


@pytest.mark.parametrize("most", [1, 7, 299])
def test_a_system_that_reads_less_than_was_asked_for_is_asked_again(shards, monkeypatch, most):
    real, asked = os.preadv, []

    def short(file, buffers, offset):
        asked.append(offset)
        return real(file, [buffers[0][:most]], offset)

    monkeypatch.setattr(os, "preadv", short)
    check(PageReader(pages(shards)))
    assert len(asked) == sum(-(-size // most) for size in (1000, 300, 1000))


def test_files_that_are_deleted_or_replaced_are_read_as_they_were(shards):
    reader = PageReader(pages(shards))
    (shards / "one").unlink()
    (shards / "new").write_bytes(bytes(5000))
    (shards / "new").replace(shards / "two")
    check(reader)


def test_a_file_that_was_cut_off_is_an_error_that_names_it(shards):
    reader = PageReader(pages(shards))
    os.truncate(shards / "one", 1009)  # one byte too few
    with pytest.raises(OSError, match=r"was truncated during the run and ends inside one\.10") as raised:
        reader.read_into(0, room(1600))
    assert (raised.value.errno, raised.value.filename) == (errno.EIO, str(shards / "one"))
    assert read(reader, 1, 1256)[256:] == CONTENT[::-1][4000:]


def test_a_disk_that_goes_away_is_an_error_that_names_the_file(shards, monkeypatch):
    reader = PageReader(pages(shards))

    def gone(*_):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(os, "preadv", gone)
    with pytest.raises(OSError, match=r"can no longer be read \(Stale file handle\)") as raised:
        reader.read_into(1, room(1256))
    assert (raised.value.errno, raised.value.filename) == (errno.ESTALE, str(shards / "two"))


def test_a_file_that_is_not_there_is_refused_at_once(shards):
    (shards / "two").unlink()
    with pytest.raises(FileNotFoundError, match="two"):
        PageReader(pages(shards))


def test_every_file_is_opened_once_and_closed_with_the_reader(shards, monkeypatch):
    real, opened = os.open, []
    monkeypatch.setattr(os, "open", lambda *choice: opened.append(real(*choice)) or opened[-1])
    reader = PageReader(pages(shards))
    assert [os.fstat(file).st_size for file in opened] == [5000, 5000]
    del reader
    for file in opened:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(file)
