"""Mutations of safetensors files: of the header, and of the tensors."""

import json
import struct
from pathlib import Path
from random import Random
from typing import Any

from attacks.tables import DEEP, LONG

DTYPES = ("F32", "BF16", "U8", "I64", "F8_E4M3", "F4", "X", "bool", "", None, 3)
SIZES = (0, -1, 1, 3, 2**31, 2**62, 2**64, 10**40, 1.5, "64", None, [64])
FLOATS = {  # dtype -> bytes of a value, and NaN, infinity and the largest value
    "F32": (4, (b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f")),
    "BF16": (2, (b"\xc0\x7f", b"\x80\xff", b"\x7f\x7f")),
}
METADATA = "__metadata__"
Pairs = list[tuple[str, Any]]


def header_length(path: Path, random: Random) -> str:
    """Write another length of the header."""
    content = path.read_bytes()
    old, size = int.from_bytes(content[:8], "little"), len(content)
    length = random.choice([0, 1, -1, 2**63, size, size - 8, 100_000_001, 2**40, old - 1]) & (2**64 - 1)
    path.write_bytes(struct.pack("<Q", length) + content[8:])
    return f"header length {length}"


def header_text(path: Path, random: Random) -> str:
    """Write a header that is no JSON object, or no table of tensors."""
    pairs, body = _read(path)
    text = _object(pairs).encode()
    wrong = [DEEP.encode(), text[:-1], b"\xff" + text, b"[]", b"null", b"{}", text + b"x", text.replace(b":", b";", 1)]
    header = random.choice([*wrong, b'{"a":' * 5000 + b"1" + b"}" * 5000])
    _write(path, header, body)
    return f"header {header[:12]!r}..."


def header_entry(path: Path, random: Random) -> str | None:
    """Change one tensor in the header: its name, dtype, shape or place."""
    pairs, body = _read(path)
    numbers = [number for number, (name, _) in enumerate(pairs) if name != METADATA]
    if not numbers:
        return None
    number = random.choice(numbers)
    name, fields = pairs[number][0], dict(pairs[number][1])
    part = random.choice(["dtype", "shape", "shape", "data_offsets", "data_offsets", "no", "name", "twice", "type"])
    new = random.choice(["", "x", f"{name}.x", "../x", "\0", "[/b]"]) if part == "name" else name
    if part == "dtype":
        fields[part] = random.choice([one for one in DTYPES if one != fields[part]])
    elif part in fields:
        fields[part] = _other_numbers(list(fields[part]), random)
    elif part == "no":
        fields.pop(random.choice(sorted(fields)))
    pairs[number] = (new, random.choice([None, 1, "x", [1]]) if part == "type" else [*fields.items()])
    if part == "twice":
        pairs.insert(number, pairs[number])
    _write(path, _object(pairs).encode(), body)
    return f"header: {part} of {name} is {str(fields.get(part, new))[:60]}"


def _other_numbers(old: list[int], random: Random) -> object:
    if old and random.random() < 0.7:
        old[random.randrange(len(old))] = random.choice(SIZES)
        return old
    return random.choice([[], [*old[::-1], 1], {}, None, "x", 3, [*old, *old]])


def swapped_tensors(path: Path, random: Random) -> str | None:
    """Give two tensors of one shape each other's bytes."""
    head, body, tensors = _parts(path)
    kinds = {name: (one["dtype"], one["shape"]) for name, one in tensors.items()}
    couples = [(one, other) for one in kinds for other in kinds if one < other and kinds[one] == kinds[other]]
    if not couples:
        return None
    one, other = random.choice(couples)
    (first, end), (second, last) = (tensors[name]["data_offsets"] for name in (one, other))
    content = bytearray(body)
    content[first:end], content[second:last] = body[second:last], body[first:end]
    path.write_bytes(head + content)
    return f"{one} and {other} are swapped"


def metadata(path: Path, random: Random) -> str:
    """Change one text of the metadata, or all of them."""
    pairs, body = _read(path)
    found = dict(dict(pairs).get(METADATA, []))
    if found and random.random() < 0.7:
        name = random.choice(sorted(found))
        old = found.pop(name)
        others = ["", "x", "{}", "null", "[" * 5000, LONG, None, 1, [], old[:-1], f"{old} "]
        if random.random() < 0.7:
            found[name] = random.choice(others)
        new, said = [*found.items()], f"{name} is {str(found.get(name, 'missing'))[:20]!r}"
    else:
        new = random.choice([None, [], "x", [("a", 1)]])
        said = str(new)
    rest = [(name, fields) for name, fields in pairs if name != METADATA]
    _write(path, _object([(METADATA, new), *rest]).encode(), body)
    return f"metadata: {said}"


def not_finite(path: Path, random: Random) -> str | None:
    """Write a NaN, an infinity or a huge number into a tensor of floats."""
    head, body, tensors = _parts(path)
    floats = [name for name, one in tensors.items() if one["dtype"] in FLOATS and len({*one["data_offsets"]}) == 2]
    if not floats:
        return None
    name = random.choice(floats)
    size, values = FLOATS[tensors[name]["dtype"]]
    start, end = tensors[name]["data_offsets"]
    place, value = start + size * random.randrange((end - start) // size), random.choice(values)
    path.write_bytes(head + body[:place] + value + body[place + size :])
    return f"{value!r} in {name}"


def _parts(path: Path) -> tuple[bytes, bytes, dict[str, Any]]:
    """Return the length and the header, the tensors' bytes, and the header's tensors."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    table = json.loads(content[8:end])
    table.pop(METADATA, None)
    return content[:end], content[end:], table


def _read(path: Path) -> tuple[Pairs, bytes]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length], object_pairs_hook=list), content[8 + length :]


def _write(path: Path, header: bytes, body: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + body)


def _object(pairs: object) -> str:
    """Return JSON text of what `object_pairs_hook=list` has read; a name may be there twice."""
    if isinstance(pairs, list) and pairs and all(isinstance(one, tuple) for one in pairs):
        return "{" + ",".join(f"{json.dumps(name)}:{_object(value)}" for name, value in pairs) + "}"
    return json.dumps(pairs)
