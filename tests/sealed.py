"""Records with digests, changed as somebody who knows the format would, or as an older version of qsvd wrote them."""

import json

import xxhash

SEAL = "qsvd_digest"


def sealed(value, indent=None, end=""):
    """JSON whose last field is the digest of the text with zeros in its place (docs/format.md)."""
    text = json.dumps({**value, SEAL: "0" * 32}, indent=indent) + end
    start, _, end = text.rpartition("0" * 32)
    return start + xxhash.xxh3_128(text.encode()).hexdigest() + end


def opened(path):
    value = json.loads(path.read_text())
    value.pop(SEAL, None)
    return value


def reseal(path, change):
    """Change a record in place, with a digest that fits, if it had one."""
    is_sealed, value = SEAL in json.loads(path.read_text()), opened(path)
    change(value)
    path.write_text(sealed(value) if is_sealed else json.dumps(value))


def without_digests(out):
    """Make a quantized model one of format 3, whose files can be changed."""
    manifest = opened(out / "qsvd.json")
    del manifest["files"]
    (out / "qsvd.json").write_text(json.dumps(manifest | {"format": 3}))
    return out
