"""Files that are complete or do not exist: written under another name, synced to the disk, then renamed.

Also the small text and JSON files themselves, lock files, and the removal of what qsvd wrote. A record is a JSON object
of ours that is read back: its last field is the digest (XXH3, 128 bits) of its text with zeros in the place of the
digest. Nothing here imports torch.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from xxhash import xxh3_128 as new_digest

from qsvd.errors import BadInput, Damaged, listing

LOCK_MARK = b"of qsvd\n"  # the content of a lock file, by which it is known as ours
COPY_AGAIN = "copy it again"  # or the folder that it is in
Stamp = tuple[int, int]  # size of a file, and the time of its last change in ns
SEAL = "qsvd_digest"  # the last field of a record
NO_DIGEST = "0" * 32


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open PATH.partial for writing; rename it to `path` when the block succeeds, remove it when the block fails.

    A PATH.partial that a killed run left is removed first. A link or a folder of that name is left alone.

    Raises:
        OSError: the file cannot be written; it names the path.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        if partial.is_file() and not partial.is_symlink():
            partial.unlink()
        opened = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except FileExistsError as error:
        reason = "is no file of qsvd's, which writes under this name before it renames the file; move it away"
        raise OSError(error.errno, reason, str(partial)) from error
    try:
        with os.fdopen(opened, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a failed write does not say where
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def sync_folder(folder: Path) -> None:
    """Write the names in a folder to the disk: a file that was renamed is then there after a power cut, too."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8."""
    with whole_file(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: object) -> None:
    """Write an indented JSON file in UTF-8, with a final newline."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_object(path: Path, advice: str = "download or write it again") -> dict[str, Any]:
    """Read a JSON object.

    Args:
        advice: What to do about a damaged file, for the sentence of an error.

    Raises:
        BadInput: the file is not valid JSON, or something other than an object.
    """
    try:
        table = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not valid JSON ({error}); {advice}") from error
    if not isinstance(table, dict):
        raise BadInput(f"{path} is a JSON {type(table).__name__}, not an object; {advice}")
    return table


def record_text(value: Mapping[str, Any], *, indent: int | None = 2) -> str:
    """Return an object as JSON with its digest and a final newline; without `indent` it is one line."""
    text = json.dumps({**value, SEAL: NO_DIGEST}, indent=indent, ensure_ascii=False) + "\n"
    start, _, end = text.rpartition(NO_DIGEST)
    return f"{start}{new_digest(text.encode()).hexdigest()}{end}"


def write_record(path: Path, value: Mapping[str, Any]) -> None:
    """Write a record."""
    write_text(path, record_text(value))


def read_record(path: Path, advice: str = COPY_AGAIN, *, since: int = 0) -> dict[str, Any]:
    """Read a record.

    Args:
        advice: As for `read_object`.
        since: The first `format` of such a file that has a digest; 0 if all have one.

    Raises:
        BadInput: the file is not a JSON object.
        Damaged: it differs from its digest, or has lost it.
    """
    value = read_object(path, advice)
    version = value.get("format", 0)
    is_sealed = since == 0 or (type(version) is int and version >= since)
    return unsealed(value, path.read_bytes(), str(path), advice, sealed=is_sealed)


def unsealed(value: dict[str, Any], text: bytes, where: str, advice: str, *, sealed: bool) -> dict[str, Any]:
    """Return an object without its digest; raise what `read_record` raises.

    Args:
        text: That it was read from.
        where: The file, or the line in it, for the sentence.
        sealed: Whether it must have a digest; older versions wrote none.
    """
    digest = value.pop(SEAL, None)
    if digest is None and not sealed:
        return value
    found = digest.encode("utf-8", "replace") if isinstance(digest, str) and digest else b"-"
    start, _, end = text.rpartition(found)
    if digest != new_digest(start + NO_DIGEST.encode() + end).hexdigest():
        raise Damaged(f"{where} is damaged: its digest differs; {advice}")
    return value


def file_digest(path: Path) -> str:
    """Return the digest of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: new_digest()).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 digest of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Lock:
    """A lock file that this process holds until `release`, which removes it, or until the process ends.

    Two processes never hold it: the lock is that of the file which has the name, and only who holds it removes that
    file. A process that opened it before it was removed opens the next one. Links are not followed.

    Args:
        file: The lock file; its folder exists.
        place: What is locked, for the sentence.

    Raises:
        BadInput: another process holds the lock, or the file is not a lock file of qsvd.
        FileNotFoundError: its folder was removed.
    """

    def __init__(self, file: Path, place: Path):
        self._opened: int | None = None
        self._file = file
        while self._opened is None:
            self._opened = self._locked(place)

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    @property
    def is_held(self) -> bool:
        """Whether it was not given back."""
        return self._opened is not None

    def release(self) -> None:
        """Give the lock back and remove its file; do nothing if that was done."""
        if self._opened is None:
            return
        self._file.unlink(missing_ok=True)  # first, while no other process can hold it
        os.close(self._opened)
        self._opened = None

    def __del__(self) -> None:
        if self._opened is not None:  # as when the process is killed: the file stays
            os.close(self._opened)

    def _locked(self, place: Path) -> int | None:
        """Return the descriptor of the lock file, locked; None if another process removed the file meanwhile."""
        opened = self._open(place)
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            content = os.pread(opened, len(LOCK_MARK) + 1, 0)
            if content not in (LOCK_MARK, b""):  # empty, if its process was killed at once
                raise self._foreign(place)
            if self._has_name(opened):
                os.pwrite(opened, LOCK_MARK, 0)
                return opened
        except BlockingIOError as error:
            os.close(opened)
            raise BadInput(f"another qsvd process is writing to {place}; wait for it, or stop it") from error
        except BaseException:
            os.close(opened)
            raise
        os.close(opened)
        return None

    def _open(self, place: Path) -> int:
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            return os.open(self._file, flags, 0o666)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise self._foreign(place) from error
            raise

    def _has_name(self, opened: int) -> bool:
        try:
            return os.path.samestat(os.stat(self._file, follow_symlinks=False), os.fstat(opened))
        except FileNotFoundError:
            return False

    def _foreign(self, place: Path) -> BadInput:
        return BadInput(f"{self._file} is not a file of qsvd, which locks {place} by this name; move it away")


def is_locked(file: Path) -> bool:
    """Return whether a process holds a lock file; one that a killed process left is not held."""
    try:
        opened = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(opened)  # with the lock
    return False


def clear(folder: Path, names: str, keep: str = "") -> bool:
    """Remove the files of a folder that have these names, then the folder, and return whether all of it is gone.

    What has another name stays, and a line of the log names it. No link is followed.

    Args:
        names: A pattern.
        keep: A file that stays, and the folder with it.
    """
    if folder.is_symlink() or not folder.is_dir():
        others = [folder] if folder.is_symlink() or folder.exists() else []
    else:
        there = sorted(path for path in folder.iterdir() if path.name != keep)
        others = [path for path in there if not re.fullmatch(names, path.name) or path.is_symlink() or path.is_dir()]
        for path in there:
            if path not in others:
                path.unlink()
        if not others and not keep:
            folder.rmdir()
    if others:
        shown = listing([str(path) for path in others])
        logging.getLogger("qsvd").warning("%s: not written by qsvd, and left there", shown)
    return not others


def stamp_of(found: os.stat_result) -> Stamp:
    """Return the size of a file and the time of its last change, ns."""
    return found.st_size, found.st_mtime_ns


def check_stamp(path: Path, found: os.stat_result, before: Stamp) -> None:
    """Refuse a file that was changed since it had a stamp, by Damaged."""
    if stamp_of(found) != before:
        raise Damaged(f"{path} was changed after this command opened it; give the command again")


def check_source(path: Path, found: object, now: Mapping[str, Stamp], otherwise: str) -> None:
    """Refuse to continue what was made of files of a 16-bit model that have changed since then.

    Args:
        path: What was made, for the sentence.
        found: The stamps of the files at that time; None if an older version kept none.
        now: Those of now, by the names of the files.
        otherwise: What to do if the model as it is now is wanted.

    Raises:
        BadInput: the sentence names the files.
    """
    if changed := changed_files(found, now):
        raise BadInput(
            f"{listing(changed)} of the 16-bit model changed after {path} was begun; restore them with their times, or "
            f"{otherwise}"
        )


def changed_files(found: object, now: Mapping[str, Stamp]) -> list[str]:
    """Return the files of a 16-bit model whose stamps differ from the ones that were kept."""
    if not isinstance(found, dict):
        return []
    return sorted(name for name in {*found, *now} if found.get(name) != list(now.get(name, ())))
