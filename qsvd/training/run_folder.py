"""RUN, the folder of one training run: its lock and identity, its checkpoints and its steps.

A checkpoint is complete or does not exist: it is written in RUN/unfinished, then renamed to RUN/checkpoint-N.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qsvd.errors import BadInput
from qsvd.files.atomic import read_object, write_text
from qsvd.files.workspace import (
    ADAPTER_RECORD,
    ANOTHER_FOLDER,
    IDENTITY,
    LOCK,
    UNFINISHED,
    check_empty,
    check_same,
    lock,
    unlock,
)
from qsvd.training.steps import Step

NAME = re.compile(r"checkpoint-(\d+)")
START = "start.json"
STEPS = "steps.jsonl"
SUMMARY = "summary.json"
LENGTH = ("steps", "epochs", "early_stopping")  # of the identity: what may change when a run is resumed
PARTS = (ADAPTER_RECORD, "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def finish(run: Path, step: int, *, keep: int, best: int | None) -> None:
    """Sync RUN/unfinished/checkpoint-N to the disk, rename it, and remove all but the newest `keep` and step `best`."""
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
        if step_of(old) != best:
            shutil.rmtree(old)


def checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    found = [(int(match[1]), path) for path in run.glob("checkpoint-*") if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found) if all((path / part).is_file() for part in PARTS)]


def step_of(checkpoint: Path) -> int:
    """Return the step after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


class RunFolder:
    """RUN, opened for one run of `qsvd train`. A `with` block releases the lock at its end.

    Args:
        folder: Made if it does not exist; else empty, or with `resume` a run with the same identity.
        identity: What the bytes of the adapter depend on.
        resume: Whether to continue the run in the folder.
        total: Steps of the whole run. A resumed run may have another number than before, if it is not below the steps
            that are done: it is extended, and its summary is removed.

    Raises:
        BadInput: the folder holds something else, a run that is not to be resumed, or a run with another identity (the
            sentence says what differs); or another process writes to it.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, resume: bool, total: int):
        self.folder = folder
        is_extended = self._check(identity, resume=resume, total=total)
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock(folder / LOCK, folder)
        if is_extended:
            (folder / SUMMARY).unlink(missing_ok=True)  # first: with another identity it would say that all is done
        self.write(IDENTITY, identity)

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        unlock(self._lock)

    @property
    def summary(self) -> dict[str, Any] | None:
        """Return summary.json; None if the run is not complete."""
        return self._json(SUMMARY)

    @property
    def start(self) -> dict[str, Any] | None:
        """Return start.json, what was measured before the first step; None if it was not measured yet."""
        return self._json(START)

    def write(self, name: str, value: object) -> None:
        """Write a JSON file."""
        write_text(self.folder / name, json.dumps(value, indent=2) + "\n")

    def steps(self) -> list[Step]:
        """Return all steps so far, without a last line that a kill left incomplete."""
        path = self.folder / STEPS
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
        return [Step(**json.loads(line)) for line in lines]

    def keep_steps(self, last: int) -> list[Step]:
        """Remove the steps after `last`, which a resumed run repeats; return the others."""
        kept = [step for step in self.steps() if step.number <= last]
        write_text(self.folder / STEPS, "".join(f"{json.dumps(asdict(step))}\n" for step in kept))
        return kept

    def add_step(self, step: Step) -> None:
        """Append one step."""
        with (self.folder / STEPS).open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(asdict(step))}\n")

    def _json(self, name: str) -> dict[str, Any] | None:
        path = self.folder / name
        return read_object(path, ANOTHER_FOLDER) if path.is_file() else None

    def _check(self, identity: Mapping[str, Any], *, resume: bool, total: int) -> bool:
        """Return whether the run is the one in the folder with another number of steps."""
        found = self._json(IDENTITY)
        if found is None:
            check_empty(self.folder, {LOCK}, "qsvd train")
            return False
        if not (checkpoints(self.folder) or (self.folder / SUMMARY).is_file()):
            return False  # it saved nothing, so nothing is lost when another run starts here
        if not resume:
            raise BadInput(f"{self.folder} holds a run already; give --resume to continue it, or --out another folder")
        length = {name: identity.get(name) for name in LENGTH}
        check_same(self.folder, {**found, **length}, identity, ANOTHER_FOLDER)
        if json.loads(json.dumps(length)) == {name: found.get(name) for name in LENGTH}:
            return False
        done = max((step.number for step in self.steps()), default=0)
        if total < done:
            raise BadInput(f"{self.folder} has {done} steps already, more than {total}; give more --steps or --epochs")
        return True
