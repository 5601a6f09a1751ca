"""Files of somebody else where a command writes."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

from attacks.commands import Command

PRECIOUS = b"precious\n"
BESIDE_A_FILE = ("", "", ".partial", ".unfinished", ".lock", ".unfinished.partial", ".costs.jsonl", ".x")
IN_A_FOLDER = (
    *("photo.jpg", "photo.json.partial", "run.json", "lock", "config.json", "README.md", "summary.json"),
    *("unfinished/photo.jpg", "unfinished/run.json", "unfinished/lock", "unfinished/photo.partial"),
    *("checkpoint-2/photo.jpg", "checkpoint-2/optimizer.pt", "checkpoint-9/photo.jpg"),
)
WAYS = ("file", "json", "link", "link", "folder", "dangling", "all")


@dataclass(frozen=True)
class Foreign:
    """What was put there.

    Args:
        added: The new paths.
        kept: The paths that must stay as they are.
    """

    how: str
    added: frozenset[Path]
    kept: frozenset[Path]


def put_foreign(place: Path, command: Command, right: Mapping[str, str], random: Random) -> Foreign:
    """Put a file, a link or a folder of somebody else where a command writes.

    Args:
        right: What the command leaves there when nothing is in its way.
    """
    photo = place / "precious" / "photo.jpg"
    photo.parent.mkdir()
    photo.write_bytes(PRECIOUS)
    top, way = place / command.out[0].removesuffix("*"), random.choice(WAYS)
    if way == "all" and not top.exists():
        top.symlink_to(photo.parent.name)
        return Foreign("the output is a link to a folder with a file", frozenset({top}), frozenset({top, photo}))
    one = _place(place, command, right, random)
    if way in ("file", "json", "folder", "all") and _may_be_left_over(one, place, command, right):
        one = one.with_name(f"{one.name}.bak")
    one.parent.mkdir(parents=True, exist_ok=True)
    if way in ("link", "dangling"):
        one.symlink_to(os.path.relpath(photo, one.parent) if way == "link" else "nowhere-at-all")
        return Foreign(f"{way}: {one.relative_to(place)}", frozenset({one}), frozenset({photo}))
    if way == "folder":
        one.mkdir()
        one /= photo.name
    one.write_bytes(b'{"program": "another", "steps": 3}\n' if way == "json" else PRECIOUS)
    return Foreign(f"{way}: {one.relative_to(place)}", frozenset({one}), frozenset({one, photo}))


def _place(place: Path, command: Command, right: Mapping[str, str], random: Random) -> Path:
    """Return a path that is not there yet: of a file that the command will write, or beside one."""
    top = place / command.out[0].removesuffix("*")
    if command.out[0].endswith("*"):
        one = top.with_name(f"{top.name}{random.choice(BESIDE_A_FILE)}")
    else:
        written = [place / name for name in sorted(right)] or [top]
        one = random.choice([*(top / name for name in IN_A_FOLDER), *(random.choice(written) for _ in range(4))])
        if random.random() < 0.4:
            one = one.with_name(f"{one.name}.partial")
    return one.with_name(f"{one.name}.bak") if one.exists() else one


def _may_be_left_over(one: Path, place: Path, command: Command, right: Mapping[str, str]) -> bool:
    """Return whether a file at this place may be of an earlier run of the command, which was killed."""
    if one.name.endswith((".partial", ".lock")) or one.name == "lock":
        return True
    return str(one.relative_to(place)) in right and command.out[0] in command.inputs
