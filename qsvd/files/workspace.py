"""What a run leaves on disk for the next one: who may write, what the bytes depend on, and whether it is complete.

Only one process at a time writes to a place: it holds a lock file. A later run continues only what a run with the same
identity began; the identity is a JSON object of all options and inputs that the bytes depend on.

    place                           lock                   identity                              complete with
    OUT of qsvd quantize            OUT/unfinished/lock    OUT/unfinished/run.json, qsvd.json    qsvd.json
    OUT of qsvd export              OUT/unfinished/lock    OUT/unfinished/run.json, the record   qsvd_export.json
    PRUNED of qsvd prune            PRUNED/unfinished/lock PRUNED/unfinished/run.json, the rec.  qsvd_prune.json
    RUN of qsvd aggregate           RUN/unfinished/lock    RUN/unfinished/run.json, the record   qsvd_aggregate.json
    RUN of qsvd train               RUN/lock               RUN/run.json                          summary.json
    a cell of qsvd compare          cells/NAME.lock        the key in cells/NAME.json            cells/NAME.json
    FILE of qsvd allocate           FILE.lock              a line in FILE                        FILE
    FILE.costs.jsonl of allocate    FILE.costs.jsonl.lock  its first line                        (stays open)
    FILE of qsvd calibrate          FILE.lock              metadata of FILE.unfinished, FILE     FILE

Nothing removes a file that qsvd did not write, nor a folder that has one: `clear` removes files by their names.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from qsvd.errors import BadInput, DoesNotFit
from qsvd.files.atomic import Lock, clear, read_record, write_record
from qsvd.inputs.paths import adapter_hint, check_not_gguf, local_path
from qsvd.ranks import wait_until

Result = TypeVar("Result")
Kind = Literal["16-bit", "split", "trained"]

MANIFEST = "qsvd.json"  # of a quantized model: its record, written last
ADAPTER_RECORD = "qsvd_adapter.json"  # of an adapter: how it was made, and on which quantized model
ADAPTER_SEALED = 4  # the first format of that record with digests
ADAPTER_TENSORS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # PEFT's names
ADAPTER_PREFIX = "base_model.model."  # of the tensors
CHAT_TEMPLATE = "chat_template.jinja"
ERRORS = "errors.jsonl"  # of a quantized model: the error of every weight, a JSON object a line
REPORT = "report.html"  # of a quantized model, a run and a comparison: a page for people
UNFINISHED = "unfinished"  # the folder of all that only a resumed run needs
IDENTITY = "run.json"
LOCK = "lock"
SEEN_AFTER = 60  # seconds until a shared disk shows another machine's files; NFS does it in 30
ANOTHER_FOLDER = "give --out another folder"
DIGEST = re.compile(r"[0-9a-f]{64}")  # SHA-256
CONTENTS = {  # digests in an identity -> of what
    "data": "the training data as tokens",
    "held_out": "the held-out data",
    "base_fingerprint": "the quantized model",
    "source_fingerprint": "the 16-bit model",
    "init_from": "the run of --init-from",
    "tokens_sha256": "the examples as tokens",
    "trained": "the run",
    "runs": "the runs",
    "gradients": "the gradients",
}


class Workspace:
    """A folder that one run fills. It can be continued by a run with the same identity until it is complete.

    A `with` block releases the lock at its end.

    Args:
        folder: Made if it does not exist; else empty, or left by a run with the same identity.
        identity: What the bytes depend on, JSON-able.
        num_bytes: Bytes that will be written; refused if the disk has less. 0 if the caller has checked that.
        rank: Number of this process, of several that do the run. Process 0 opens the folder first, and holds the lock;
            the others hold OUT/unfinished/lock.1 and so on, and write no record.

    Raises:
        BadInput: the folder holds something else, or a run with another identity (the sentence says what differs), or
            another process writes to it; or this process does not see what process 0 wrote.
        DoesNotFit: the files do not fit on the disk.
    """

    record: ClassVar[str]  # the JSON file that is written last, with the identity under "run"
    command: ClassVar[str]  # that writes such a folder
    parts: ClassVar[str] = "$."  # a pattern of names of unfinished work, beside a file for each weight
    sealed_since: ClassVar[int] = 1  # the first format of the record with a digest

    def __init__(self, folder: Path, identity: Mapping[str, Any], num_bytes: int = 0, *, rank: int = 0):
        self.folder = folder
        self.unfinished = folder / UNFINISHED
        self.identity = json.loads(json.dumps(identity))
        self._lock: Lock | None = None
        self.is_complete = self.check(folder, self.identity)
        if rank:
            self._lock = None if self.is_complete else self._beside(rank)
            return
        if self.is_complete:
            self._clear_complete()
            return
        if num_bytes:
            check_space(folder, num_bytes, "give a folder on another disk")
        self._lock = self._locked()
        try:
            self.is_complete = self.check(folder, self.identity)  # again: another process may have finished it
            if self.is_complete:
                self.close()
            else:
                for beside in self.unfinished.glob(
                    f"{LOCK}.*"
                ):  # of an earlier run: none of its processes still writes
                    Lock(beside, self.folder).release()
                write_record(self.unfinished / IDENTITY, self.identity)
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.release()

    def close(self) -> None:
        """Remove what only a resumed run needs; call it when the record is written."""
        assert self._lock is not None, "the run writes"
        clear(self.unfinished, rf"(\d{{5}}\.\w+|{IDENTITY}|{self.parts})(\.partial)?", keep=LOCK)
        self._lock.release()
        with suppress(OSError):  # it has files of somebody else, or another process looks whether there is work
            self.unfinished.rmdir()

    def _locked(self) -> "Lock":
        """Make the folder and lock it; another process may remove `unfinished` in between."""
        while True:
            with suppress(FileNotFoundError, FileExistsError):
                self.unfinished.mkdir(parents=True, exist_ok=True)
                return Lock(self.unfinished / LOCK, self.folder)
            if self.unfinished.exists() and not self.unfinished.is_dir():
                raise BadInput(f"{self.unfinished} is not a folder; {ANOTHER_FOLDER}")

    def _beside(self, rank: int) -> "Lock":
        """Return the lock of another process than the first one, which has written the identity."""
        if not wait_until((self.unfinished / IDENTITY).is_file, seconds=SEEN_AFTER):
            raise BadInput(
                f"process {rank} does not see what process 0 wrote to {self.folder}; give --out a folder on a disk "
                "that all machines share"
            )
        return Lock(self.unfinished / f"{LOCK}.{rank}", self.folder)

    def _clear_complete(self) -> None:
        """Remove what a kill left of the unfinished work of a complete folder, if nobody else does so."""
        if self.unfinished.is_dir() and not self.unfinished.is_symlink():
            with suppress(BadInput, OSError):
                self._lock = Lock(self.unfinished / LOCK, self.folder)
                self.close()

    @classmethod
    def check(cls, folder: Path, identity: Mapping[str, Any], otherwise: str = ANOTHER_FOLDER) -> bool:
        """Refuse a folder that is neither empty nor of a run with this identity; return whether it is complete.

        Args:
            otherwise: How to use another folder.
        """
        return settled(folder, lambda: cls._check(folder, identity, otherwise))

    @classmethod
    def _check(cls, folder: Path, identity: Mapping[str, Any], otherwise: str) -> bool:
        if (folder / UNFINISHED).is_symlink():
            raise BadInput(f"{folder / UNFINISHED} is a link, and {cls.command} makes a folder there; {otherwise}")
        is_complete = (folder / cls.record).is_file()
        path = folder / cls.record if is_complete else folder / UNFINISHED / IDENTITY
        if not path.is_file():
            # a run that was killed at once has left no more than these
            check_empty(folder, {UNFINISHED}, cls.command, otherwise)
            check_empty(folder / UNFINISHED, {LOCK, f"{IDENTITY}.partial"}, cls.command, otherwise)
            return False
        found = read_record(path, otherwise, since=cls.sealed_since if is_complete else 1)
        if is_complete:
            found = found.get("run")
        if not isinstance(found, dict):
            raise BadInput(f"{path} is damaged: it has no record of a run; {otherwise}")
        check_same(folder, found, identity, otherwise)
        return is_complete


def settled(folder: Path, check: Callable[[], Result]) -> Result:
    """Return what a check of a folder returns; one that fails is made again if files came or went meanwhile.

    Another process may have written or removed files between two looks of the check.
    """
    while True:
        before = _names(folder)
        try:
            return check()
        except (BadInput, FileNotFoundError):
            if _names(folder) == before:
                raise


def _names(folder: Path) -> list[set[str]]:
    """Return the names in a folder and in its folder of unfinished work."""
    found = []
    for place in (folder, folder / UNFINISHED):
        try:
            found.append(set(os.listdir(place)))
        except OSError:
            found.append(set())
    return found


def check_same(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any], otherwise: str) -> None:
    """Refuse to continue what a run with another identity has left.

    Args:
        path: The folder or file, for the sentence.
        found: The identity of the earlier run.
        wanted: That of this run.
        otherwise: What to do if the same options are not wanted, "give --out another folder".

    Raises:
        BadInput: the identities differ; the sentence names every difference.
    """
    wanted = json.loads(json.dumps(wanted))  # JSON has no tuples
    different = "; ".join(
        _difference(name, found.get(name), wanted.get(name))
        for name in sorted({*found, *wanted}, key=lambda name: (_is_digest(found.get(name), wanted.get(name)), name))
        if found.get(name) != wanted.get(name)
    )
    if different:
        raise BadInput(
            f"{path} was written with other options: {different}; give the same options to continue, or {otherwise}"
        )


def _difference(name: str, found: object, wanted: object) -> str:
    """Return in words how two values differ; digests tell a reader nothing, so they are not shown."""
    if _is_digest(found, wanted):
        return f"{CONTENTS.get(name, name)} changed"
    return f"{name} {json.dumps(found)} there, {json.dumps(wanted)} now"


def _is_digest(*values: object) -> bool:
    return any(isinstance(value, str) and DIGEST.fullmatch(value) for value in values)


def check_empty(folder: Path, ignored: Iterable[str], command: str, otherwise: str = ANOTHER_FOLDER) -> None:
    """Refuse a folder that has anything in it but the ignored names.

    Raises:
        BadInput: it has, or it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder} is not a folder; {otherwise}")
    if folder.is_dir() and {path.name for path in folder.iterdir()} - {*ignored}:
        raise BadInput(f"{folder} is not empty and was not written by {command}; {otherwise}")


def check_begun(run: Path) -> None:
    """Refuse a folder for a run of qsvd train that has more in it than a run that was killed at once leaves."""
    check_empty(run, {LOCK, f"{IDENTITY}.partial"}, "qsvd train")


def model_kind(name: str) -> Kind:
    """Return what a name stands for, a Hub id for a 16-bit model; a BadInput where it is none of the three."""
    folder = local_path(name)
    if folder is None:
        return "16-bit"
    kinds: dict[str, Kind] = {ADAPTER_RECORD: "trained", MANIFEST: "split", "config.json": "16-bit"}
    for file, kind in kinds.items():
        if (folder / file).is_file():
            return kind
    check_not_gguf(folder)
    if folder.is_file():
        raise BadInput(f"{name} is a file, and a model is a folder with config.json: give MODEL first, then DATA")
    if (folder / UNFINISHED).is_dir():
        raise BadInput(f"{name} is not finished; run the command that writes it again, and it continues")
    hint = adapter_hint(folder) or "give the folder of a model, or a Hub id"
    known = "a 16-bit model (config.json), a quantized model (qsvd.json) or a run of qsvd train"
    raise BadInput(f"{name} is not {known}; {hint}")


def check_space(folder: Path, num_bytes: int, otherwise: str) -> None:
    """Refuse to write more than the disk can hold; what an earlier run wrote to the folder counts as written.

    Args:
        folder: It may not exist yet.
        num_bytes: Bytes of all files when the run is complete.
        otherwise: What to do if the disk cannot be freed.

    Raises:
        DoesNotFit: too few bytes are free; the sentence gives both numbers.
    """
    place = folder.absolute()
    written = sum(file.stat().st_size for file in place.rglob("*") if file.is_file()) if place.is_dir() else 0
    while not place.exists():
        place = place.parent
    needed, free = num_bytes - written, shutil.disk_usage(place).free
    if needed > free:
        raise DoesNotFit(
            f"{folder} needs {needed / 1e9:.2f} GB more disk space ({place} has {free / 1e9:.2f} GB free); "
            f"free some, or {otherwise}"
        )
