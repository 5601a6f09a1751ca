"""The checkpoints of a training run.

A checkpoint is complete or does not exist: it is written in RUN/unfinished, then renamed to RUN/checkpoint-N.
"""

import errno
import json
import os
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from qsvd.errors import BadInput, Damaged, first_line
from qsvd.files.atomic import clear, file_digest, new_digest, read_object, read_record, sync_folder, write_record
from qsvd.files.trained.records import START, STEPS
from qsvd.files.workspace import ADAPTER_RECORD, UNFINISHED
from qsvd.records import stored

NAME = re.compile(r"checkpoint-(\d+)")
PARTS = (ADAPTER_RECORD, "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
RESULTS = ("number", "loss", "grad_norm", "learning_rate", "tokens", "held_out")  # of a line: the same in a repeat
DIGESTS = "qsvd_files.json"  # of a checkpoint: the digests of its files
# all files of a checkpoint
PART_NAMES = rf"({'|'.join(map(re.escape, (*PARTS, DIGESTS)))}|(qsvd_adapter|hooks)\.safetensors)(\.partial)?"
NO_NAMES = "$."
PROBE = 2**20  # bytes


@dataclass(frozen=True)
class CheckpointFiles:
    """What qsvd_files.json of a checkpoint holds: digests of its other files by place, and of all steps so far."""

    format: int
    files: Mapping[str, str]
    steps: str = ""
    start: str = ""


def make_way(place: Path) -> None:
    """Remove what a killed run has left where a checkpoint is written.

    Raises:
        OSError: there are files that qsvd did not write.
    """
    if os.path.lexists(place) and not clear(place, PART_NAMES):
        raise OSError(errno.ENOTEMPTY, "has files that qsvd did not write, where it has to save; move it", str(place))


def finish(run: Path, step: int, *, keep: int, best: int | None, every: float = 1) -> None:
    """Sync RUN/unfinished/checkpoint-N to the disk, rename it, and remove older ones.

    Left are this one, the newest `keep` whose steps divide by `every`, and that of step `best`: the same checkpoints,
    whether the run was interrupted between them or not. Before the rename the digests of its files are written. Files
    that qsvd did not write stay where they are.

    Raises:
        OSError: RUN/checkpoint-N has such files.
    """
    written, place = run / UNFINISHED / f"checkpoint-{step}", run / f"checkpoint-{step}"
    files = sorted(path for path in written.rglob("*") if path.is_file())
    for file in (*files, *run.glob(STEPS)):  # a checkpoint is not taken if its step is not in steps.jsonl
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())
    digests = {str(file.relative_to(written)): file_digest(file) for file in files}
    write_record(written / DIGESTS, {"format": 1, "files": digests, **_before(run, step)})
    sync_folder(written)
    make_way(place)
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
def written_whole(run: Path, step: int) -> Iterator[Path]:
    """Make way for a checkpoint and yield its folder; turn a RuntimeError of torch.save into the OSError of the disk.

    torch does not say why it cannot write. The newest file of the checkpoint, which is lost, is written on to see it.
    """
    place = run / UNFINISHED / f"checkpoint-{step}"
    make_way(place)
    try:
        yield place
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
    return [path for path, lacking in all_checkpoints(run) if not lacking]


def all_checkpoints(run: Path) -> list[tuple[Path, list[str]]]:
    """Return the checkpoints of a run, oldest first, and the parts that each lacks; without any part it is none."""
    found = [(int(match[1]), path) for path in run.glob("checkpoint-*") if (match := NAME.fullmatch(path.name))]
    lacking = [(path, [part for part in PARTS if not (path / part).is_file()]) for _, path in sorted(found)]
    return [(path, parts) for path, parts in lacking if len(parts) < len(PARTS)]


def check_readable(checkpoint: Path, *, sealed: bool) -> None:
    """Refuse a checkpoint with a damaged part, or of other steps than steps.jsonl has, before the model is loaded.

    Args:
        sealed: Whether it must have digests; those of older versions have none, and torch tries to read them.

    Raises:
        Damaged: the sentence names the file. No code of it is run.
    """
    if sealed or (checkpoint / DIGESTS).is_file():
        _check_digests(checkpoint)
        return
    from transformers.trainer import safe_globals

    for part in (part for part in PARTS if part.endswith((".pt", ".pth"))):
        try:
            with safe_globals():
                torch.load(checkpoint / part, map_location="cpu", weights_only=True)
        except (RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
            reason = first_line(error) or type(error).__name__
            raise Damaged(f"{checkpoint / part} is damaged ({reason})") from error
    try:
        read_object(checkpoint / "trainer_state.json")
    except BadInput as error:
        raise Damaged(str(error)) from error


def _check_digests(checkpoint: Path) -> None:
    if not (checkpoint / DIGESTS).is_file():
        raise Damaged(f"{checkpoint} lacks {DIGESTS}")
    found = stored(CheckpointFiles, read_record(checkpoint / DIGESTS), f"{checkpoint / DIGESTS} is damaged")
    for name, digest in found.files.items():
        if not (checkpoint / name).is_file():
            raise Damaged(f"{checkpoint} lacks {name}")
        if file_digest(checkpoint / name) != digest:
            raise Damaged(f"{checkpoint / name} is damaged: its digest differs")
    run, now = checkpoint.parent, _before(checkpoint.parent, step_of(checkpoint))
    if found.steps not in ("", now["steps"]):
        raise Damaged(f"{run / STEPS} is damaged: {checkpoint} was written after other steps")
    if now["start"] and found.start not in ("", now["start"]):
        raise Damaged(f"{run / START} is damaged: {checkpoint} was written after another one")


def _before(run: Path, last: int) -> dict[str, str]:
    """Return digests of start.json, if it is there, and of the steps until `last`, without times and memory."""
    path = run / STEPS
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    steps = [json.loads(line) for line in lines[:last]]  # checked by read_steps
    results = json.dumps([[step[name] for name in RESULTS] for step in steps])
    start = file_digest(run / START) if (run / START).is_file() else ""
    return {"steps": new_digest(results.encode()).hexdigest(), "start": start}


def step_of(checkpoint: Path) -> int:
    """Return the step after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("checkpoint-"))
