"""Statistics of a model's gradients, as `qsvd calibrate` writes them: one safetensors file (docs/format.md).

    {module}.rows         float32 [O]  mean over a row of F_ij, the mean over examples of the squared gradient
    {module}.columns      float32 [I]  mean over a column of F_ij
    {module}.trace        float32 [1]  estimated trace of the Hessian of the mean loss in this weight; optional
    {module}.trace_error  float32 [1]  standard error of that estimate

    {module}.gradient_left    float32 [O, 2K]  left singular vectors of the gradient of the mean loss; optional
    {module}.gradient_values  float32 [2K]     its largest singular values, descending
    {module}.gradient_right   float32 [K, I]   right singular vectors

Metadata: format, fingerprint (of the checkpoint), and a JSON record of how they were made. The file of measured
candidates of `qsvd allocate` is here too.

Shape suffixes: O = out features, I = in features, K = rank that LoRA-GA can train.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from qsvd.decompose.candidates import CandidateErrors
from qsvd.decompose.objective import Objective, fisher
from qsvd.errors import BadInput, Damaged, listing
from qsvd.files.atomic import SEAL, Lock, Stamp, check_source, record_text, unsealed, whole_file
from qsvd.files.readers import check_tensors
from qsvd.files.safetensors import SafetensorsHeader, TensorEntry, new_tensors, read_header, read_tensor, write_stream
from qsvd.files.source import Checkpoint
from qsvd.files.workspace import check_same
from qsvd.plan.weights import WeightSpec
from qsvd.records import stored

FORMATS = ("qsvd statistics 1", "qsvd statistics 2")  # since the second one with digests
UNFINISHED_FORMATS = ("qsvd unfinished statistics 1", "qsvd unfinished statistics 2")
ROWS, COLUMNS, TRACE = "rows", "columns", "trace"
OTHER_FILE = "remove the file, or give --out another file"
LEFT, VALUES, RIGHT = "gradient_left", "gradient_values", "gradient_right"


def most_rank(rank: int, shape: tuple[int, int]) -> int:
    """Return the rank that LoRA-GA trains of a weight: it takes so many right, and the next left, singular vectors."""
    return min(rank, min(shape) // 2)


@dataclass(frozen=True)
class Statistics:
    """An open file of statistics. The tensors of a module are read on demand.

    Args:
        fingerprint: `Checkpoint.fingerprint` of the 16-bit model.
        modules: Paths of the weights in the transformers model, sorted.
        record: How they were made: model, data, examples, tokens, seed, and so on.
    """

    path: Path
    fingerprint: str
    modules: tuple[str, ...]
    record: Mapping[str, Any]
    _entries: Mapping[str, TensorEntry] = field(repr=False)

    @property
    def has_traces(self) -> bool:
        """Return whether the file has traces of the Hessian."""
        return all(f"{module}.{TRACE}" in self._entries for module in self.modules)

    def objective(self, module: str) -> Objective:
        """Return LQ-LoRA's weights of the rows and columns of one weight.

        Raises:
            BadInput: the file lacks the module, or its moments are negative or not finite.
        """
        try:
            return fisher(self._read(module, ROWS), self._read(module, COLUMNS))
        except ValueError as error:
            raise BadInput(f"{self.path}: {module}: {error}") from error

    def trace(self, module: str) -> float:
        """Return the trace of the Hessian of the loss in one weight.

        Raises:
            BadInput: the file has no traces, lacks the module, or its trace is not finite.
        """
        if not self.has_traces:
            raise BadInput(f"{self.path} has no traces of the Hessian; run qsvd calibrate again with --traces 8")
        trace = float(self._read(module, TRACE))
        if not math.isfinite(trace):
            raise BadInput(f"{self.path}: {module}: its trace is {trace}; run qsvd calibrate again")
        return trace

    def gradient_rank(self, module: str) -> int:
        """Return K of one weight; 0 if the file has no gradient of it."""
        entry = self._entries.get(f"{module}.{RIGHT}")
        return 0 if entry is None else entry.shape[0]

    def gradient(self, module: str) -> tuple[Tensor, Tensor]:
        """Return the left [O, 2 K] and the right [K, I] singular vectors of the gradient of one weight.

        Raises:
            BadInput: the file lacks them, or a value is not finite.
        """
        parts = self._read(module, LEFT), self._read(module, RIGHT)
        if not all(part.isfinite().all() for part in parts):
            raise BadInput(f"{self.path}: {module}: its gradient is not finite; run qsvd calibrate again")
        return parts

    def _read(self, module: str, part: str) -> Tensor:
        entry = self._entries.get(f"{module}.{part}")
        if entry is None:
            raise BadInput(f"the file has no {part} of {module}")
        return read_tensor(entry)


def open_statistics(path: Path) -> Statistics:
    """Open a file that `qsvd calibrate` wrote; only its header is read.

    Raises:
        BadInput: there is no such file, qsvd calibrate did not write it, or it is damaged.
    """
    if not path.is_file():
        raise BadInput(f"{path} does not exist; qsvd calibrate MODEL DATA --out {path} makes it")
    header = _header(path, FORMATS, "give another file")
    modules = tuple(sorted(name.removesuffix(f".{ROWS}") for name in header.tensors if name.endswith(f".{ROWS}")))
    wanted = [f"{module}.{part}" for module in modules for part in (ROWS, COLUMNS)]
    entries = [header.tensors.get(name) for name in wanted]
    pairs = zip(wanted, entries, strict=True)
    wrong = [name for name, entry in pairs if entry is None or entry.dtype != "F32" or len(entry.shape) != 1]
    if wrong or not modules:
        raise BadInput(f"{path} is damaged: {listing(wrong) or 'it has no weights'}; run qsvd calibrate again")
    try:
        record, fingerprint = json.loads(header.metadata["record"]), header.metadata["fingerprint"]
    except (KeyError, ValueError) as error:
        raise BadInput(f"{path} is damaged: its metadata lack {error}; run qsvd calibrate again") from error
    return Statistics(path, fingerprint, modules, record, header.tensors)


def _header(path: Path, formats: Sequence[str], otherwise: str) -> SafetensorsHeader:
    """Read the header of a file of ours; of the newest format it has digests."""
    header = read_header(path)
    found = header.metadata.get("format")
    if found not in formats:
        raise BadInput(f"{path} was not written by qsvd calibrate (format {found!r}); {otherwise}")
    if found == formats[-1] and not header.digest:
        raise Damaged(f"{path} is damaged: it has lost its digests; run qsvd calibrate again")
    return header


def check_statistics(statistics: Statistics, fingerprint: str, modules: Sequence[str]) -> None:
    """Refuse statistics of another model.

    Args:
        fingerprint: `Checkpoint.fingerprint` of the 16-bit model.
        modules: Paths of the weights that need statistics.

    Raises:
        BadInput: the statistics are those of another checkpoint, or lack weights.
    """
    if statistics.fingerprint != fingerprint:
        made_of = statistics.record.get("model")
        raise BadInput(
            f"{statistics.path} has the statistics of another model ({made_of}, fingerprint "
            f"{statistics.fingerprint[:12]} instead of {fingerprint[:12]}); run qsvd calibrate on this one"
        )
    lacking = sorted({*modules} - {*statistics.modules})
    if lacking:
        raise BadInput(
            f"{statistics.path} lacks {len(lacking)} of {len(modules)} weights: {listing(lacking)}; run qsvd calibrate "
            "with the same --include, --exclude and --include-towers, or with none"
        )


def write_statistics(path: Path, tensors: Mapping[str, Tensor], *, fingerprint: str, record: Mapping[str, Any]) -> None:
    """Write statistics to a file that is complete or does not exist.

    Args:
        tensors: By the names above.
        fingerprint: `Checkpoint.fingerprint` of the 16-bit model.
        record: How they were made, JSON-able.
    """
    metadata = {"format": FORMATS[-1], "fingerprint": fingerprint, "record": json.dumps(record, sort_keys=True)}
    write_stream(path, new_tensors(tensors), metadata)


def unfinished_path(path: Path) -> Path:
    """Return the file in which an interrupted run keeps its sums."""
    return path.with_name(f"{path.name}.unfinished")


def lock_statistics(path: Path) -> Lock:
    """Lock a file of statistics for the process that measures it; a BadInput where another process does."""
    return Lock(path.with_name(f"{path.name}.lock"), path)


def save_unfinished(
    path: Path, sums: Mapping[str, Tensor], identity: Mapping[str, Any], stamps: Mapping[str, Stamp]
) -> None:
    """Write the sums of a run; `path` is the file of its result, `stamps` are those of the 16-bit model."""
    metadata = {"format": UNFINISHED_FORMATS[-1], "identity": json.dumps(identity, sort_keys=True)}
    metadata["source_files"] = json.dumps(stamps)
    write_stream(unfinished_path(path), new_tensors(sums), metadata)


def open_unfinished(path: Path, identity: Mapping[str, Any], stamps: Mapping[str, Stamp]) -> dict[str, Tensor] | None:
    """Read the sums of an earlier run with the same identity; return None if there are none.

    Raises:
        BadInput: the sums are from a run with other options or data, or the file is something else.
    """
    unfinished = unfinished_path(path)
    if not unfinished.exists():
        return None
    header = _header(unfinished, UNFINISHED_FORMATS, "move it, or give --out another file")
    try:
        found = json.loads(header.metadata["identity"])
        files = json.loads(header.metadata.get("source_files", "null"))
    except (KeyError, ValueError) as error:
        raise BadInput(f"{unfinished} is damaged: its metadata lack {error}; remove it to start again") from error
    check_same(unfinished, found, identity, OTHER_FILE)
    check_source(unfinished, files, stamps, OTHER_FILE)
    return {name: read_tensor(entry) for name, entry in header.tensors.items()}


class CostsFile:
    """FILE.costs.jsonl, the measured candidates of weights: a line with the identity of the run, then a line a weight.

    A `with` block releases its lock at the end.

    Args:
        path: Made if it does not exist, or left by a run with the same `identity`.
        identity: What the measurements depend on, JSON-able.
        stamps: Those of the files of the 16-bit model.

    Every measured weight is in `measured`, by module.

    Raises:
        BadInput: the file holds something else (the sentence says what differs), is damaged, or another process writes
            to it.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], stamps: Mapping[str, Stamp]):
        self.path, self._stamps = path, stamps
        self._lock = Lock(path.with_name(f"{path.name}.lock"), path)
        try:
            self.measured = self._read(identity)
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> "CostsFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def keep(self, module: str, measured: CandidateErrors) -> None:
        """Append one weight."""
        self._append({"module": module} | asdict(measured))
        self.measured[module] = measured

    def _read(self, identity: Mapping[str, Any]) -> dict[str, CandidateErrors]:
        """Read what an earlier run measured, and cut off a line that a kill left incomplete."""
        content = self.path.read_bytes() if self.path.is_file() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if not whole:
            line = record_text({**identity, "source_files": self._stamps}, indent=None).encode()
            if not line.startswith(content):
                raise BadInput(f"{self.path} was not written by qsvd; give another --out")
            with whole_file(self.path) as file:
                file.write(line)
            return {}
        if whole != content:
            os.truncate(self.path, len(whole))
        first, *lines = whole.splitlines(keepends=True)
        again = "delete the file, or give another --out"
        found = self._line(1, first, again, sealed=False)
        files = found.pop("source_files", None)
        check_same(self.path, found, identity, again)
        check_source(self.path, files, self._stamps, again)
        is_sealed = SEAL.encode() in first
        measured = {}
        for number, line in enumerate(lines, start=2):
            again = "delete the line, its weight is measured again"
            record = self._line(number, line, again, sealed=is_sealed)
            module = str(record.pop("module", ""))
            what = f"line {number} of {self.path} is damaged ({again})"
            measured[module] = stored(CandidateErrors, record, what)
        return measured

    def _line(self, number: int, line: bytes, advice: str, *, sealed: bool) -> dict[str, Any]:
        where = f"line {number} of {self.path}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{where} is damaged: it is not valid JSON; {advice}") from error
        if not isinstance(record, dict):
            raise BadInput(f"{where} is damaged: it is not an object; {advice}")
        return unsealed(record, line, where, advice, sealed=sealed)

    def _append(self, record: Mapping[str, Any]) -> None:
        with self.path.open("ab") as file:
            file.write(record_text(record, indent=None).encode())
            file.flush()
            os.fsync(file.fileno())


def statistics_for(
    objective: str, file: Path | None, checkpoint: Checkpoint, weights: Sequence[WeightSpec]
) -> Statistics | None:
    """Open the statistics that an objective needs; return None if no file is given.

    Raises:
        BadInput: they are those of another model, or have no traces for the Hessian.
        Damaged: a tensor differs from its digest.
    """
    if file is None:
        return None
    statistics = open_statistics(file.expanduser())
    check_tensors(statistics.path)  # of gradients, too: the result names the whole file by its digest
    modules = [spec.module for spec in weights]
    check_statistics(statistics, checkpoint.fingerprint, modules)
    wrong = []
    for module in modules:
        try:
            _ = statistics.objective(module) if objective == "fisher" else statistics.trace(module)
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        raise BadInput(f"{len(wrong)} of {len(modules)} weights have no usable statistics: {listing(wrong, 2)}")
    return statistics
