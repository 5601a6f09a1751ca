"""Mutations of files: every one is a function of a path and a random generator, which says in words what it did.

A mutation that does not go with a file returns None and has changed nothing.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from random import Random

from attacks.pickles import pickled
from attacks.tables import json_text, json_value, lines
from attacks.tensors import header_entry, header_length, header_text, metadata, not_finite, swapped_tensors
from attacks.texts import STRINGS, written

UNREADABLE = "unreadable"
Mutate = Callable[[Path, Random], str | None]


def _cut(path: Path, random: Random) -> str | None:
    size = path.stat().st_size
    if not size:
        return None
    end = random.choice([random.randrange(size), size - 1, size // 2, min(size - 1, 8)])
    os.truncate(path, end)
    return f"truncated from {size} to {end} bytes"


def _empty(path: Path, random: Random) -> str:
    content = random.choice([b"", b"\n", b" ", b"\0", b"null", b"{}", b"[]"])
    path.write_bytes(content)
    return f"holds {content!r} alone"


def _append(path: Path, random: Random) -> str:
    extra = random.choice([b"\0", b"x", b"\n{", random.randbytes(100), b"\n\n\n"])
    with path.open("ab") as file:
        file.write(extra)
    return f"{len(extra)} bytes more, {extra[:8]!r}"


def _flip(path: Path, random: Random) -> str | None:
    content = bytearray(path.read_bytes())
    if not content:
        return None
    flipped = sorted(random.randrange(8 * len(content)) for _ in range(random.choice([1, 1, 2, 8])))
    for bit in flipped:
        content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    return f"flipped bits {flipped} of {8 * len(content)}"


def _zero(path: Path, random: Random) -> str | None:
    content = bytearray(path.read_bytes())
    if not any(content):
        return None
    start = random.randrange(len(content))
    end = min(len(content), start + random.choice([16, 512, 4096]))
    content[start:end] = bytes(end - start)
    path.write_bytes(content)
    return f"zeros from byte {start} to {end}"


def _noise(path: Path, random: Random) -> str:
    size = random.choice([1, 40, 3000])
    path.write_bytes(random.randbytes(size))
    return f"{size} random bytes"


def _missing(path: Path, _: Random) -> str:
    path.unlink()
    return "missing"


def _folder(path: Path, random: Random) -> str:
    path.unlink()
    path.mkdir()
    if random.random() < 0.5:
        (path / "photo.jpg").write_bytes(b"precious")
        return "a folder with a file in it"
    return "a folder"


def _link(path: Path, random: Random) -> str:
    how = random.choice(["broken", "to itself", "to /dev/null"])
    path.unlink()
    path.symlink_to({"broken": "nowhere", "to itself": path.name, "to /dev/null": "/dev/null"}[how])
    return f"a link, {how}"


def _unreadable(path: Path, _: Random) -> str:
    path.chmod(0)
    return UNREADABLE


ANY: tuple[Mutate, ...] = (_cut, _empty, _append, _flip, _flip, _zero, _noise, _missing, _folder, _link, _unreadable)
HEADER: tuple[Mutate, ...] = (header_length, header_text, header_entry, header_entry, header_entry, metadata)
TENSORS: tuple[Mutate, ...] = (*HEADER, swapped_tensors, not_finite, _flip, _flip, _zero, _cut)
KINDS: Sequence[tuple[str, Sequence[Mutate]]] = (  # patterns of names, and what goes with them
    ("*.safetensors", TENSORS),
    ("*.unfinished", TENSORS),
    ("*.factors", TENSORS),
    ("*.residual", TENSORS),
    ("*.json", (json_value,) * 8 + (json_text,) * 2),
    ("*.jsonl", (lines,) * 8),
    ("*.pt", (pickled,) * 4),
    ("*.pth", (pickled,) * 4),
    ("*.txt", (lines,) * 3),
)


def mutations_of(path: Path) -> list[Mutate]:
    """Return the mutations that go with a file, the likelier ones several times."""
    found = [mutate for pattern, many in KINDS if fnmatch(path.name, pattern) for mutate in many]
    texts = [written] * 6 if any(fnmatch(path.name, pattern) for pattern in STRINGS) else []
    return [*ANY, *found, *texts]


def swapped_with(path: Path, others: Sequence[Path], random: Random) -> str | None:
    """Replace a file by one of the same name of another run or of another model."""
    others = [other for other in others if other.read_bytes() != path.read_bytes()]
    if not others:
        return None
    other = random.choice(others)
    shutil.copyfile(other, path)
    return f"that of {'/'.join(other.parts[-3:-1])}"
