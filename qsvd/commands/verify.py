"""`qsvd verify`: compare files that qsvd wrote with the digests that were written with them."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from qsvd.console.progress import quiet, say, watched
from qsvd.errors import BadInput, Damaged, listing, show_size
from qsvd.export.average import AggregateFolder
from qsvd.export.trained import ExportFolder
from qsvd.files.adapter import open_adapter
from qsvd.files.atomic import COPY_AGAIN, SEAL, file_digest, read_record, unsealed, write_record
from qsvd.files.layout import ADAPTER_CONFIG, ADAPTER_TENSORS, digest
from qsvd.files.quantized.manifest import DIGESTS_SINCE, QUANTIZE_AGAIN, read_manifest
from qsvd.files.readers import check_tensors, content_digest
from qsvd.files.safetensors import read_tensor
from qsvd.files.source import PRUNED_RECORD
from qsvd.files.split_folder import SplitFolder, open_split
from qsvd.files.trained.records import FORMAT as RUN_FORMAT
from qsvd.files.trained.records import START, STEPS, SUMMARY
from qsvd.files.workspace import (
    ADAPTER_RECORD,
    ADAPTER_SEALED,
    ERRORS,
    IDENTITY,
    MANIFEST,
)
from qsvd.options import Verify
from qsvd.prune.folder import PruneFolder
from qsvd.records import Progress, ShowProgress, show_nothing
from qsvd.training.checkpoints import DIGESTS, NAME

MOST_FAULTS = 20  # in the sentence
SEALED_SINCE = {  # the formats of our records that have digests
    MANIFEST: DIGESTS_SINCE,
    ADAPTER_RECORD: ADAPTER_SEALED,
    ExportFolder.record: ExportFolder.sealed_since,
    AggregateFolder.record: AggregateFolder.sealed_since,
    PruneFolder.record: PruneFolder.sealed_since,
    PRUNED_RECORD: 0,
    IDENTITY: RUN_FORMAT,
    DIGESTS: 0,
}
OURS = b'{"__metadata__":{"qsvd_digests"'  # the start of a header, also in files with other suffixes


@dataclass
class Checked:
    """What was found below a folder.

    Args:
        files: Files that have digests.
        plain: Files of the same kinds that have none.
        faults: A sentence for every damaged or missing file.
        every: How many files there are.
    """

    files: set[Path] = field(default_factory=set)
    plain: set[Path] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)
    every: int = 0


def main(options: Verify) -> None:
    """Run `qsvd verify`: 1 accept changed files, 2 check and show progress, 3 print what was checked.

    Raises:
        BadInput: there is nothing that qsvd wrote.
        Damaged: files differ from their digests, or are missing.
    """
    top = options.path.expanduser()
    if not top.exists():
        raise BadInput(f"no folder or file {options.path} here; give what qsvd wrote")
    with quiet(reads_data=False):
        if options.accept:
            for name in accept(top):
                say(f"{top / name} is accepted as it is")
        with watched("file", "nothing was changed") as show:
            found = check(top, show)
    if found.faults:
        raise Damaged(listing(found.faults, MOST_FAULTS, separator="; "))
    if not found.files:
        raise BadInput(f"{options.path} has no files with digests; qsvd verify checks what qsvd wrote")
    size = show_size(sum(path.stat().st_size for path in found.files))
    some = f" of {found.every}" if found.every > len(found.files) else ""
    say(f"{options.path}: {len(found.files)}{some} files ({size}) are as they were written")
    if plain := sorted(str(path) for path in found.plain - found.files):
        say(f"not checked, since they have no digests: {listing(plain)}")


def check(top: Path, show: ShowProgress = show_nothing) -> Checked:
    """Check one file, or all files below a folder."""
    there = [top] if top.is_file() else sorted(top.rglob("*"))
    paths, broken = [p for p in there if p.is_file()], [p for p in there if p.is_symlink() and not p.exists()]
    total, done, found = sum(path.stat().st_size for path in paths), 0, Checked(every=len(paths))
    found.faults += [f"{path} is a link to a file that is not there" for path in broken]
    for number, path in enumerate(paths, start=1):
        try:
            _check_file(path, found)
        except BadInput as error:
            found.faults.append(str(error))
        done += path.stat().st_size
        show(Progress(done, done, max(total, 1), f"{number}/{len(paths)} files", rate=("MB/s", 1e6)))
    if not found.faults:
        found.faults += _faults_of_folder(top, found)
    return found


def accept(folder: Path) -> list[str]:
    """Take the configs and tokenizer files of a quantized model as they are now; return those that had changed.

    Raises:
        BadInput: the folder is not a quantized model, or one without digests.
        Damaged: its manifest is damaged, or a file is missing.
    """
    manifest = read_manifest(folder)
    if manifest["format"] < DIGESTS_SINCE:
        raise BadInput(f"{folder} was written by a version without digests; there is nothing to accept")
    files = manifest["files"]
    if absent := [name for name in files if not (folder / name).is_file()]:
        raise Damaged(f"{folder} lacks {listing(absent)}; {QUANTIZE_AGAIN}")
    now = {name: file_digest(folder / name) for name in files if not name.endswith(".safetensors")}
    changed = [name for name in now if now[name] != files[name]]
    if changed:
        write_record(folder / MANIFEST, manifest | {"files": files | now})
    return changed


def _check_file(path: Path, found: Checked) -> None:
    """Check one file and, if it is a record of other files, these."""
    if _has_tensors(path):
        found.plain.add(path)
        if check_tensors(path).digest:
            found.files.add(path)
    elif path.suffix == ".json":
        _check_record(path, found)
    elif path.suffix == ".jsonl":
        _check_lines(path, found)


def _check_record(path: Path, found: Checked) -> None:
    if path.name not in SEALED_SINCE and SEAL.encode() not in path.read_bytes():
        found.plain.add(path)
        return
    record = read_record(path, since=SEALED_SINCE.get(path.name, 0))
    found.files.add(path)
    files = record.get("files")
    if path.name == IDENTITY and "format" in record:  # older ones have none, and no digests
        found.faults += _faults_of_run(path.parent)
    if isinstance(files, dict):
        _check_named(path, files, found)


def _faults_of_run(folder: Path) -> Iterator[str]:
    """Yield what has lost its digest in a run with digests."""
    records = [path for name in (START, SUMMARY) if (path := folder / name).is_file()]
    yield from (f"{path} is damaged: it has no digest" for path in records if SEAL.encode() not in path.read_bytes())
    saved = [path for path in folder.iterdir() if NAME.fullmatch(path.name) and path.is_dir()]
    is_complete = all((folder / name).is_file() for name in (SUMMARY, ADAPTER_TENSORS))
    if is_complete and not (folder / ADAPTER_CONFIG).is_file():
        yield f"{folder} lacks {ADAPTER_CONFIG}"
    yield from (f"{path} lacks {DIGESTS}" for path in saved if not (path / DIGESTS).is_file())


def _check_lines(path: Path, found: Checked) -> None:
    if path.name == ERRORS and path.with_name("config.json").is_file() and not path.with_name(MANIFEST).is_file():
        found.faults.append(f"{path.parent} lacks {MANIFEST}")
    lines = path.read_bytes().splitlines(keepends=True)
    if not lines or SEAL.encode() not in lines[0]:
        found.plain.add(path)
        return
    found.files.add(path)
    if path.name == STEPS and not path.with_name(IDENTITY).is_file():
        found.faults.append(f"{path.parent} lacks {IDENTITY}")
    for number, line in enumerate(lines, start=1):
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError):
            fields = {}
        where = f"line {number} of {path}"
        unsealed(fields if isinstance(fields, dict) else {}, line, where, COPY_AGAIN, sealed=True)


def _has_tensors(path: Path) -> bool:
    with path.open("rb") as file:
        return path.suffix == ".safetensors" or file.read(8 + len(OURS))[8:] == OURS


def _check_named(record: Path, files: dict[str, str], found: Checked) -> None:
    """Compare the files that a record names: of files with tensors the headers, but for checkpoints."""
    read = file_digest if record.name == DIGESTS else content_digest
    for name, expected in files.items():
        path = record.parent / name
        found.files.add(path)
        if not path.is_file():
            found.faults.append(f"{path} is missing")
            found.files.discard(path)
        elif read(path) != expected:
            found.faults.append(f"{path} is not the file that was written with {record.name}")


def _faults_of_folder(top: Path, found: Checked) -> Iterator[str]:
    """Yield what opening the folder as a quantized model or a run finds, and damaged weights of older versions."""
    try:
        if (top / MANIFEST).is_file():
            split = open_split(top)
            if "files" not in split.manifest:
                found.files |= {top / weight["file"] for weight in split.weights.values()}
                yield from _residual_faults(split)
        if (top / ADAPTER_RECORD).is_file():
            open_adapter(top)
            if (top / IDENTITY).is_file() and not (top / SUMMARY).is_file():
                yield f"{top} lacks {SUMMARY}: it is not finished; give the same qsvd train command again"
    except BadInput as error:
        yield str(error)


def _residual_faults(split: SplitFolder) -> Iterator[str]:
    for name, weight in (split.weights | split.tables).items():
        tensors = {key: read_tensor(split.tensors[key]) for key in split.part_names(name)}
        if digest(tensors) != weight["residual_sha256"]:
            yield f"{split.folder / weight['file']} is damaged at {name}: its digest differs"
