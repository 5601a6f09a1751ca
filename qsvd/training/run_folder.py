"""RUN, the folder of one training run: its lock and identity, its checkpoints and its steps.

A checkpoint is complete or does not exist: it is written in RUN/unfinished, then renamed to RUN/checkpoint-N.
"""

import errno
import json
import math
import os
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qsvd.errors import BadInput, first_line
from qsvd.files.atomic import Lock, clear, read_object, sync_folder, write_text
from qsvd.files.workspace import (
    ADAPTER_RECORD,
    ANOTHER_FOLDER,
    IDENTITY,
    LOCK,
    UNFINISHED,
    check_begun,
    check_empty,
    check_same,
    settled,
)

NAME = re.compile(r"checkpoint-(\d+)")
START = "start.json"
STEPS = "steps.jsonl"
SUMMARY = "summary.json"
TRACKED = "runs"  # the folder of TensorBoard
KEPT = "blocks_with_activations"  # of the identity: how many blocks are not recomputed
FREE = ("gradient_checkpointing", KEPT)  # of the identity, the first of older versions: these change no result
BATCHES = ("batch_size", "accumulate")  # of the identity: their product is the result, but for rounding
LENGTH = ("steps", "epochs", "early_stopping")  # of the identity: what may change when a run is resumed
PARTS = (ADAPTER_RECORD, "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
PART_NAMES = (
    rf"({'|'.join(map(re.escape, PARTS))}|(qsvd_adapter|hooks)\.safetensors)(\.partial)?"  # all of a checkpoint
)
NO_NAMES = "$."
PROBE = 2**20  # bytes


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Args:
        loss: Nats per trained token, or per example for a classifier.
        tokens, seconds: From the start of the run, interrupted parts included.
        peak_bytes: Of the GPU; on a CPU, of the process.
        held_out: Loss on the held-out examples after the step, in the same unit; None where it was not measured.
    """

    number: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    seconds: float
    peak_bytes: int
    held_out: float | None = None


def finish(run: Path, step: int, *, keep: int, best: int | None, every: float = 1) -> None:
    """Sync RUN/unfinished/checkpoint-N to the disk, rename it, and remove older ones.

    Left are this one, the newest `keep` whose steps divide by `every`, and that of step `best`: the same checkpoints,
    whether the run was interrupted between them or not. Files that qsvd did not write stay where they are.

    Raises:
        OSError: RUN/checkpoint-N has such files.
    """
    written, place = run / UNFINISHED / f"checkpoint-{step}", run / f"checkpoint-{step}"
    for file in [path for path in written.rglob("*") if path.is_file()]:
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())
    sync_folder(written)
    if place.exists() and not clear(place, PART_NAMES):
        raise OSError(errno.ENOTEMPTY, "has files that qsvd did not write, where it has to save; move it", str(place))
    written.rename(place)
    saved = checkpoints(run)
    left = {step, best, *[step_of(one) for one in saved if step_of(one) % every == 0 or step_of(one) == step][-keep:]}
    for old in saved:
        if step_of(old) not in left:
            _remove(old, run / UNFINISHED)
    for killed in (run / UNFINISHED).glob("checkpoint-*"):
        clear(killed, PART_NAMES)
    clear(run / UNFINISHED, NO_NAMES)
    sync_folder(run)


def _remove(checkpoint: Path, unfinished: Path) -> None:
    """Remove a checkpoint; one without files of somebody else is renamed first, so that no kill leaves a part of it."""
    if all(re.fullmatch(PART_NAMES, path.name) for path in checkpoint.iterdir()):
        checkpoint = checkpoint.rename(unfinished / checkpoint.name)
    clear(checkpoint, PART_NAMES)


@contextmanager
def written_whole(run: Path) -> Iterator[None]:
    """Turn the RuntimeError of a torch.save that cannot write into the OSError of the disk.

    torch does not say why it cannot. The newest file of the checkpoint, which is lost, is written on to see it.
    """
    try:
        yield
    except RuntimeError as error:
        files = [path for path in (run / UNFINISHED).rglob("*") if path.is_file()]
        if not files:
            raise
        newest = max(files, key=lambda path: path.stat().st_mtime_ns)
        try:
            with newest.open("ab") as file:
                file.write(bytes(PROBE))
                file.flush()
                os.fsync(file.fileno())
        except OSError as reason:
            raise OSError(reason.errno, reason.strerror, str(newest)) from error
        raise


def checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    found = [(int(match[1]), path) for path in run.glob("checkpoint-*") if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found) if all((path / part).is_file() for part in PARTS)]


def check_readable(checkpoint: Path) -> None:
    """Refuse a checkpoint with a damaged part, before the model is loaded.

    Raises:
        BadInput: the sentence names the file. No code of it is run.
    """
    from transformers.trainer import safe_globals

    otherwise = f"remove {checkpoint} to go on from the checkpoint before it, or start again"
    read_object(checkpoint / "trainer_state.json", otherwise)
    for part in (part for part in PARTS if part.endswith((".pt", ".pth"))):
        try:
            with safe_globals():
                torch.load(checkpoint / part, map_location="cpu", weights_only=True)
        except (RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
            reason = first_line(error) or type(error).__name__
            raise BadInput(f"{checkpoint / part} is damaged ({reason}); {otherwise}") from error


def step_of(checkpoint: Path) -> int:
    """Return the step after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


class RunFolder:
    """RUN, opened for one run of `qsvd train`. A `with` block releases the lock at its end.

    Args:
        folder: Made if it does not exist; else empty, or a run with the same identity, which is continued.
        identity: What the bytes of the adapter depend on.
        resume: Whether a run may have another number of steps than before, if it is not below the steps that are done:
            it is extended, and its summary is removed.
        total: Steps of the whole run.

    Raises:
        BadInput: the folder holds something else or a run with another identity (the sentence says what differs), or
            another process writes to it.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, resume: bool, total: int):
        self.folder = folder
        check_run_folder(folder, identity, resume=resume, total=total)
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = Lock(folder / LOCK, folder)
        try:  # again: another process may have written to it before the lock was free
            if check_run_folder(folder, identity, resume=resume, total=total):
                (folder / SUMMARY).unlink(missing_ok=True)  # first: with another identity it says that all is done
            self.write(IDENTITY, identity)
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

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
        """Return all steps so far; see `read_steps`."""
        return read_steps(self.folder)

    def keep_steps(self, last: int) -> list[Step]:
        """Remove the steps after `last`, which a resumed run repeats; return the others."""
        kept = [step for step in self.steps() if step.number <= last]
        write_text(self.folder / STEPS, "".join(f"{json.dumps(asdict(step))}\n" for step in kept))
        return kept

    def add_step(self, step: Step) -> None:
        """Append one step."""
        path = self.folder / STEPS
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps(asdict(step))}\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error

    def _json(self, name: str) -> dict[str, Any] | None:
        path = self.folder / name
        return read_object(path, ANOTHER_FOLDER) if path.is_file() else None


def check_run_folder(
    folder: Path, identity: Mapping[str, Any], *, resume: bool, total: int, unknown: Sequence[str] = ()
) -> bool:
    """Refuse a folder as RunFolder does; return whether the run in it is this one with another number of steps.

    Args:
        unknown: Names in the identity whose values are not known yet.
    """
    return settled(folder, lambda: _is_extended(folder, identity, resume=resume, total=total, unknown=unknown))


def _is_extended(
    folder: Path, identity: Mapping[str, Any], *, resume: bool, total: int, unknown: Sequence[str]
) -> bool:
    path = folder / IDENTITY
    if not path.is_file():
        check_begun(folder)
        return False
    found = read_object(path, ANOTHER_FOLDER)
    if not is_saved(folder):
        _check_own(folder, found, identity)
        return False  # it saved nothing, so nothing is lost when another run starts here
    found, identity = ({k: v for k, v in one.items() if k not in FREE} for one in (found, identity))
    if _sequences(found) == _sequences(identity):
        found |= {name: identity.get(name) for name in BATCHES}
    identity |= {name: found.get(name) for name in unknown}
    length = {name: identity.get(name) for name in LENGTH}
    check_same(folder, {**found, **length}, identity, ANOTHER_FOLDER)
    if json.loads(json.dumps(length)) == {name: found.get(name) for name in LENGTH}:
        return False
    if not resume:
        check_same(folder, found, identity, f"--resume for more steps, or {ANOTHER_FOLDER}")
    done = max((step.number for step in read_steps(folder)), default=0)
    if total < done:
        raise BadInput(f"{folder} has {done} steps already, more than {total}; give more --steps or --epochs")
    return True


def _check_own(folder: Path, found: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Refuse a folder without a checkpoint that has other files than a run that was stopped before its first one."""
    if not found.keys() & identity.keys():
        check_empty(folder, (), "qsvd train")
    saved = {path.name for path in folder.rglob("checkpoint-*") if NAME.fullmatch(path.name)}
    partial = {path.name for path in folder.glob("*.json*.partial")}
    check_empty(folder, {LOCK, IDENTITY, START, STEPS, UNFINISHED, TRACKED, *saved, *partial}, "qsvd train")
    check_empty(folder / UNFINISHED, saved, "qsvd train")


@dataclass(frozen=True)
class Recorded:
    """What was chosen when a run began. With the same numbers it repeats itself to the bit on a GPU, too.

    Args:
        unrecomputed: Number of blocks that keep their activations; None if all was free in an older version.
        batch_size: Sequences of a batch.
    """

    unrecomputed: int | None
    batch_size: int | None


def recorded(folder: Path) -> Recorded | None:
    """Return what a run that goes on has chosen; None for a new run."""
    path = folder / IDENTITY
    if not (path.is_file() and is_saved(folder)):
        return None
    found = read_object(path, ANOTHER_FOLDER)
    first = 0 if found.get("gradient_checkpointing") else None  # older versions recorded True for none
    return Recorded(found.get(KEPT, first), found.get("batch_size"))


def _sequences(identity: Mapping[str, Any]) -> int:
    """Return how many sequences a step has."""
    return math.prod(identity.get(name, 1) for name in BATCHES)


def is_saved(folder: Path) -> bool:
    """Return whether a run has a checkpoint to go on from, or is complete."""
    return bool(checkpoints(folder)) or (folder / SUMMARY).is_file()


def read_steps(folder: Path) -> list[Step]:
    """Return all steps so far, without a last line that a kill left incomplete."""
    path = folder / STEPS
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    return [Step(**json.loads(line)) for line in lines]
