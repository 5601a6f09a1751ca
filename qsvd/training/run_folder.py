"""RUN, the folder of one training run: its lock, its identity and its steps."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qsvd.errors import BadInput
from qsvd.files.adapter import PARAMETERS
from qsvd.files.atomic import (
    Lock,
    read_record,
    record_text,
    write_record,
    write_text,
)
from qsvd.files.layout import ADAPTER_TENSORS
from qsvd.files.readers import content_digest
from qsvd.files.trained.records import (
    COMMAND,
    FILES,
    FORMAT,
    START,
    STEPS,
    SUMMARY,
    TEXTS,
    TOTAL,
    read_identity,
    read_steps,
)
from qsvd.files.workspace import (
    ADAPTER_RECORD,
    ANOTHER_FOLDER,
    IDENTITY,
    LOCK,
    REPORT,
    UNFINISHED,
    check_begun,
    check_empty,
    check_same,
    settled,
)
from qsvd.records import Start, Step, Texts, stored
from qsvd.report.training import RunSummary
from qsvd.training.checkpoints import NAME, checkpoints

LAST = (IDENTITY, START, STEPS, ADAPTER_RECORD, PARAMETERS, ADAPTER_TENSORS)
TRACKED = "runs"  # the folder of TensorBoard
KEPT = "blocks_with_activations"  # of the identity: how many blocks are not recomputed
FREE = ("gradient_checkpointing", KEPT, COMMAND, TOTAL)  # of run.json, the first of older versions: no result changes
BATCHES = ("batch_size", "accumulate")  # of the identity: their product is the result, but for rounding
LENGTH = ("steps", "epochs", "early_stopping")  # of the identity: what may change when a run is resumed


class RunFolder:
    """RUN, opened for one run of `qsvd train`. A `with` block releases the lock at its end.

    Args:
        folder: Made if it does not exist; else empty, or a run with the same identity, which is continued.
        identity: What the bytes of the adapter depend on.
        resume: Whether a run may have another number of steps than before, if it is not below the steps that are done:
            it is extended, and its summary is removed.
        total: Steps of the whole run.
        command: The command line of the run, which a report shows.

    Raises:
        BadInput: the folder holds something else or a run with another identity (the sentence says what differs), or
            another process writes to it.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, resume: bool, total: int, command: str = ""):
        self.folder = folder
        check_run_folder(folder, identity, resume=resume, total=total)
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = Lock(folder / LOCK, folder)
        try:  # again: another process may have written to it before the lock was free
            if check_run_folder(folder, identity, resume=resume, total=total):
                (folder / SUMMARY).unlink(missing_ok=True)  # first: with another identity it says that all is done
            found = read_identity(folder) or {"format": FORMAT}
            self.is_sealed = "format" in found
            shown = {COMMAND: command, TOTAL: total}
            if (folder / SUMMARY).is_file():  # it has a digest of this record
                shown = {name: found[name] for name in shown if name in found}
            self.write(IDENTITY, ({"format": FORMAT} if self.is_sealed else {}) | dict(identity) | shown)
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    @property
    def summary(self) -> RunSummary | None:
        """Return summary.json; None if the run is not complete."""
        found = self._json(SUMMARY)
        what = f"{self.folder / SUMMARY} is damaged ({ANOTHER_FOLDER})"
        if found is None:
            return None
        return stored(RunSummary, {name: value for name, value in found.items() if name != FILES}, what)

    @property
    def start(self) -> Start | None:
        """Return start.json, what was measured before the first step; None if it was not measured yet."""
        found = self._json(START)
        return None if found is None else stored(Start, found, f"{self.folder / START} is damaged ({ANOTHER_FOLDER})")

    def write_texts(self, texts: Texts | None) -> None:
        """Write texts.json, or remove that of a run that saved nothing."""
        if texts is None:
            (self.folder / TEXTS).unlink(missing_ok=True)
        else:
            self.write(TEXTS, asdict(texts))

    def write(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a record."""
        write_record(self.folder / name, value)

    def finish(self, summary: RunSummary) -> None:
        """Write the summary, with the digests of the files that the run has written before: it is complete."""
        there = [name for name in LAST if (self.folder / name).is_file()]
        self.write(SUMMARY, asdict(summary) | {FILES: {name: content_digest(self.folder / name) for name in there}})

    def steps(self) -> list[Step]:
        """Return all steps so far; see `read_steps`."""
        return read_steps(self.folder, sealed=self.is_sealed)

    def keep_steps(self, last: int) -> list[Step]:
        """Remove the steps after `last`, which a resumed run repeats; return the others."""
        kept = [step for step in self.steps() if step.number <= last]
        write_text(self.folder / STEPS, "".join(self._line(step) for step in kept))
        return kept

    def add_step(self, step: Step) -> None:
        """Append one step."""
        path = self.folder / STEPS
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(self._line(step))
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error

    def _line(self, step: Step) -> str:
        return record_text(asdict(step), indent=None)

    def _json(self, name: str) -> dict[str, Any] | None:
        path = self.folder / name
        return read_record(path, ANOTHER_FOLDER, since=0 if self.is_sealed else 1) if path.is_file() else None


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
    found = read_identity(folder)
    if found is None:
        check_begun(folder)
        return False
    is_sealed = found.pop("format", None) is not None
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
    done = max((step.number for step in read_steps(folder, sealed=is_sealed)), default=0)
    if total < done:
        raise BadInput(f"{folder} has {done} steps already, more than {total}; give more --steps or --epochs")
    return True


def _check_own(folder: Path, found: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Refuse a folder without a checkpoint that has other files than a run that was stopped before its first one."""
    if not found.keys() & identity.keys():
        check_empty(folder, (), "qsvd train")
    saved = {path.name for path in folder.rglob("checkpoint-*") if NAME.fullmatch(path.name)}
    partial = {path.name for kind in ("json*", "html") for path in folder.glob(f"*.{kind}.partial")}
    check_empty(
        folder, {LOCK, IDENTITY, START, STEPS, TEXTS, UNFINISHED, TRACKED, REPORT, *saved, *partial}, "qsvd train"
    )
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
    found = read_identity(folder) if is_saved(folder) else None
    if found is None:
        return None
    first = 0 if found.get("gradient_checkpointing") else None  # older versions recorded True for none
    chosen = {"unrecomputed": found.get(KEPT, first), "batch_size": found.get("batch_size")}
    return stored(Recorded, chosen, f"{folder / IDENTITY} is damaged ({ANOTHER_FOLDER})")


def _sequences(identity: Mapping[str, Any]) -> object:
    """Return how many sequences a step has; in a damaged record something else."""
    numbers = [identity.get(name, 1) for name in BATCHES]
    return math.prod(numbers) if all(type(number) is int for number in numbers) else numbers


def is_saved(folder: Path) -> bool:
    """Return whether a run has a checkpoint to go on from, or is complete."""
    return bool(checkpoints(folder)) or (folder / SUMMARY).is_file()
