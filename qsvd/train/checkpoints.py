"""Checkpoints that are whole or not there: written in RUN/unfinished, then renamed to RUN/checkpoint-N."""

import os
import re
import shutil
from pathlib import Path

from qsvd.checkpoint.adapter_folder import RECORD

UNFINISHED = "unfinished"
NAME = re.compile(r"checkpoint-(\d+)")
PARTS = (RECORD, "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def finish(run: Path, step: int, *, keep: int) -> None:
    """Put RUN/unfinished/checkpoint-N in its place, once it is on the disk, and drop all but the newest `keep`."""
    written = run / UNFINISHED / f"checkpoint-{step}"
    for file in [path for path in written.rglob("*") if path.is_file()]:
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())
    place = run / f"checkpoint-{step}"
    if place.exists():
        shutil.rmtree(place)
    written.rename(place)
    shutil.rmtree(run / UNFINISHED)
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old)


def checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first; one that lacks a part is passed over."""
    found = [(int(match[1]), path) for path in run.glob("checkpoint-*") if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found) if all((path / part).is_file() for part in PARTS)]


def step_of(checkpoint: Path) -> int:
    """The step after which it was written."""
    match = NAME.fullmatch(checkpoint.name)
    assert match, "from checkpoints()"
    return int(match[1])
