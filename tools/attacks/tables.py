"""Mutations of JSON and of the lines of text files."""

import json
from pathlib import Path
from random import Random

DEEP = "[" * 100_000
LONG = "1" * 5_000  # more digits than Python turns into an int
NUMBERS = ("-1", "0", "1", "3", "1.5", "1e308", "1e999", "-1e999", "NaN", "Infinity", "123456789012345678901234567890")
TEXTS = ('""', '"x"', '"../../x"', '"[/b]"', '"\\u0000"', '"\\ud800"', '"' + "y" * 100_000 + '"')
OTHERS = ("null", "true", "[]", "[1]", "[null]", "{}", '{"x": 1}', LONG, "[" * 2_000 + "]" * 2_000)
VALUES = (*NUMBERS, *TEXTS, *OTHERS)  # as JSON text
Place = tuple[str | int, ...]


def json_value(path: Path, random: Random) -> str | None:
    """Change or remove one value of a JSON file."""
    found = _changed(text_of(path), random)
    if found is None:
        return None
    path.write_text(found[0])
    return found[1]


def json_text(path: Path, random: Random) -> str:
    """Write what is no JSON, or not what was there before."""
    text = text_of(path)
    ways = {
        "deep": DEEP.encode(),
        "not UTF-8": text.replace('"', '"\udcff', 2).encode(errors="surrogateescape"),
        "a byte order mark": b"\xef\xbb\xbf" + text.encode(),
        "UTF-16": text.encode("utf-16"),
        "in a list": f"[{text}]".encode(),
        "twice": (text + text).encode(),
        "a comment": f"// x\n{text}".encode(),
        "a comma": text.rstrip().rstrip("}").encode() + b",}",
        "deep inside": b'{"a": ' + DEEP.encode() + b"]" * len(DEEP) + b"," + text.encode().lstrip()[1:],
    }
    how = random.choice([*ways])
    path.write_bytes(ways[how])
    return how


def lines(path: Path, random: Random) -> str | None:
    """Change one line of a file."""
    found = text_of(path).splitlines(keepends=True)
    if not found:
        return None
    number = random.randrange(len(found))
    line = found[number]
    changed = _changed(line, random)
    ways = {
        "away": [],
        "twice": [line, line],
        "after the first": [line, found[0]],
        "null": ["null\n"],
        "a list": ["[1]\n"],
        "cut": [f"{line[: len(line) // 2]}\n"],
        "blank": ["\n"],
        "carriage return": [line.replace("\n", "\r\n")],
        "no end": [line.rstrip("\n")],
    }
    values = {} if changed is None else {changed[1]: [f"{changed[0]}\n"]}
    how = random.choice([*ways, *values, *values, *values])
    found[number : number + 1] = (ways | values)[how]
    with path.open("w", newline="") as file:
        file.write("".join(found))
    return f"line {number + 1}: {how}"


def text_of(path: Path) -> str:
    """Return the text of a file of any bytes."""
    return path.read_text(encoding="utf-8", errors="surrogateescape")


def _changed(text: str, random: Random) -> tuple[str, str] | None:
    """Return JSON with one other value, and in words which; None if the text is no JSON with values in it."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    if not (places := _places(value)):
        return None
    depth = random.choice([1, 1, 2, 9])
    place = random.choice([one for one in places if len(one) <= depth])
    old, said = value, ".".join(str(step)[:40] for step in place)
    for step in place:
        old = old[step]
    if random.random() < 0.2:
        return _written(value, place, None), f"no {said}"
    new = random.choice(VALUES) if random.random() < 0.6 else _near(old, random)
    return _written(value, place, new), f"{said} is {new[:40]}, not {json.dumps(old)[:40]}"


def _places(value: object, place: Place = ()) -> list[Place]:
    """Return the paths of all values in a JSON value; of a list the first three."""
    found: list[Place] = [place] if place else []
    inner = [*value.items()] if isinstance(value, dict) else [*enumerate(value[:3])] if isinstance(value, list) else []
    for step, one in inner:
        found += _places(one, (*place, step))
    return found


def _written(value: object, place: Place, new: str | None) -> str:
    """Return JSON text of a value in which one place has another text; None leaves it out."""
    if not place:
        return json.dumps(value) if new is None else new
    inner = [*value.items()] if isinstance(value, dict) else [*enumerate(value)] if isinstance(value, list) else []
    is_end = len(place) == 1 and new is None
    kept = [
        (step, _written(one, place[1:], new) if step == place[0] else json.dumps(one))
        for step, one in inner
        if not (is_end and step == place[0])
    ]
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(step)}: {text}" for step, text in kept) + "}"
    return "[" + ", ".join(text for _, text in kept) + "]"


def _near(value: object, random: Random) -> str:
    """Return JSON text of a value that is much like another."""
    choices: list[object] = [0, "null", False]
    if isinstance(value, bool):
        choices = [not value]
    elif isinstance(value, int):
        choices = [value + 1, value - 1, 2 * value, -value, value + 0.5, str(value)]
    elif isinstance(value, float):
        choices = [value * 1.5, -value, value * 1e30, str(value), int(value)]
    elif isinstance(value, str):
        choices = [f"{value}x", value[:-1], value.upper(), [value], value[::-1]]
    elif isinstance(value, list):
        choices = [value[:-1], [*value, *value], value[::-1], dict(enumerate(value))]
    elif isinstance(value, dict):
        choices = [[*value], dict([*value.items()][:-1]), [*value.values()]]
    return json.dumps(random.choice(choices))
