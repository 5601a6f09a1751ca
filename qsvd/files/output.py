"""An output folder that grows weight by weight, so that a killed run goes on where it stopped (docs/format.md).

Every finished weight lies in OUT/unfinished as two files, each of which appears by rename when it is whole:
NNNNN.residual and then NNNNN.factors, whose metadata hold the weight's record. That pair is the journal. When all
weights of a shard are there, the shard is written from their residuals, which then go. `unfinished` goes last of all.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from qsvd.errors import BadInput
from qsvd.files.atomic import write_text
from qsvd.files.layout import digest
from qsvd.files.safetensors import DTYPE_NAMES, NewTensor, TensorEntry, read_header, write_stream

UNFINISHED = "unfinished"
MANIFEST = "qsvd.json"
RUN = "run.json"
LOCK = "lock"
PYTORCH = {"format": "pt"}


class OutputFolder:
    """OUT, opened for one run of `qsvd quantize`; a `with` block lets it go again.

    Args:
        folder: Made if it is not there; empty, or left by a run with the same `identity`.
        identity: What the bytes depend on: options, source fingerprint. Kept in OUT/unfinished/run.json.

    Raises:
        BadInput: the folder holds something else, or another run's result (the sentence says what differs), or
            another process is at work in it.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]):
        self.folder = folder
        self.unfinished = folder / UNFINISHED
        self.is_complete = (folder / MANIFEST).is_file()
        self._lock = FileLock(self.unfinished / LOCK)
        found = _found_run(folder)
        if found is not None:
            _check_same(folder, found, identity)
        elif folder.exists() and _holds_strangers(folder):
            raise BadInput(f"{folder} is not empty and not a result of qsvd quantize; give --out another folder")
        if self.is_complete:
            shutil.rmtree(self.unfinished, ignore_errors=True)  # a kill may have left some of it
            return
        self.unfinished.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(blocking=False)
        except Timeout as error:
            raise BadInput(f"another qsvd quantize is at work in {folder}; wait for it, or stop it") from error
        write_text(self.unfinished / RUN, to_json(identity))

    def __enter__(self) -> "OutputFolder":
        return self

    def __exit__(self, *_: object) -> None:
        """Let another process work in the folder."""
        self._lock.release()

    def is_done(self, index: int) -> bool:
        """Whether weight number `index` is finished."""
        return self._factors(index).is_file()

    def save(self, index: int, residual: Mapping[str, Tensor], factors: Mapping[str, Tensor], record: object) -> None:
        """Keep one finished weight; `record` is JSON-able and comes back from `record`."""
        write_stream(self._residual(index), in_memory(residual), PYTORCH)
        self.save_factors(index, factors, record, digest(residual))

    def save_factors(self, index: int, factors: Mapping[str, Tensor], record: object, residual_sha256: str) -> None:
        """Keep one weight whose residual goes straight into its shard; else as `save`."""
        metadata = PYTORCH | {"record": json.dumps(record), "residual_sha256": residual_sha256}
        write_stream(self._factors(index), in_memory(factors), metadata)

    def record(self, index: int) -> Any:
        """What `save` was given for this weight."""
        return json.loads(read_header(self._factors(index)).metadata["record"])

    def residual_sha256(self, index: int) -> str:
        """The digest of the weight's residual tensors."""
        return read_header(self._factors(index)).metadata["residual_sha256"]

    def write_shard(self, file: str, indices: Sequence[int], copied: Sequence[NewTensor]) -> None:
        """Join finished residuals and tensors of the source into one shard, then drop the residuals' own files."""
        parts = [part for index in indices for part in _in_file(self._residual(index))]
        write_stream(self.folder / file, [*parts, *copied], PYTORCH)
        for index in indices:
            self._residual(index).unlink()

    def write_adapter(self, file: str, indices: Sequence[int], metadata: Mapping[str, str]) -> None:
        """Join the factors of all weights into one file."""
        (self.folder / file).parent.mkdir(exist_ok=True)
        parts = [part for index in indices for part in _in_file(self._factors(index))]
        write_stream(self.folder / file, parts, PYTORCH | dict(metadata))

    def close(self) -> None:
        """Drop what only a resumed run needs."""
        self._lock.release()
        shutil.rmtree(self.unfinished)

    def _residual(self, index: int) -> Path:
        return self.unfinished / f"{index:05d}.residual"

    def _factors(self, index: int) -> Path:
        return self.unfinished / f"{index:05d}.factors"


def to_json(value: object) -> str:
    """Indented JSON with a final newline."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _found_run(folder: Path) -> Mapping[str, Any] | None:
    """The identity of the run that the folder holds, complete or not; None if it holds none."""
    for path in (folder / MANIFEST, folder / UNFINISHED / RUN):
        if path.is_file():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
                run = found["run"] if path.name == MANIFEST else found
            except (ValueError, KeyError, TypeError) as error:
                raise BadInput(f"{path} is damaged ({error!r}); give --out another folder") from error
            if not isinstance(run, Mapping):
                raise BadInput(f"{path} is damaged (no record of a run); give --out another folder")
            return run
    return None


def _holds_strangers(folder: Path) -> bool:
    """Whether there is anything that a run killed in its first moment does not leave."""
    unfinished = folder / UNFINISHED
    inside = unfinished.iterdir() if unfinished.is_dir() else ()
    others = (path for path in folder.iterdir() if path != unfinished)
    return any(others) or any(path.name not in (LOCK, f"{RUN}.partial") for path in inside)


def _check_same(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    if different := differences(found, wanted):
        raise BadInput(
            f"{folder} holds a run with other options: {different}; "
            "give the same options to go on, or --out another folder"
        )


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Where two identities differ, in words; empty where they do not."""
    return "; ".join(
        f"{name} {json.dumps(found.get(name))} there, {json.dumps(wanted.get(name))} now"
        for name in sorted({*found, *wanted})
        if found.get(name) != wanted.get(name)
    )


def in_memory(tensors: Mapping[str, Tensor]) -> list[NewTensor]:
    """Tensors to write as they are."""
    return [NewTensor(name, DTYPE_NAMES[t.dtype], tuple(t.shape), t) for name, t in tensors.items()]


def _in_file(path: Path) -> Iterator[NewTensor]:
    for entry in read_header(path).tensors.values():
        yield from_entry(entry)


def from_entry(entry: TensorEntry) -> NewTensor:
    """A tensor to copy from the file where it lies."""
    return NewTensor(entry.name, entry.dtype, entry.shape, entry)
