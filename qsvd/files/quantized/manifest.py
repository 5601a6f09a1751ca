"""qsvd.json, the manifest of a quantized model, and errors.jsonl: read and checked, without torch."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qsvd.errors import BadInput, Damaged, listing
from qsvd.files.atomic import file_digest, read_record
from qsvd.files.workspace import MANIFEST, UNFINISHED
from qsvd.records import Role, WeightError, stored

QUANTIZE_AGAIN = "copy the folder again, or quantize again"
FORMATS = (1, 2, 3, 4)  # of qsvd.json; in 1 the components are in adapter/, 3 has tables, 4 has digests of all files
DIGESTS_SINCE = 4


@dataclass(frozen=True)
class SourceRecord:
    """A part of a tensor of the 16-bit model, in qsvd.json."""

    tensor: str
    shape: tuple[int, ...]
    index: int | None = None
    rows: tuple[int, ...] | None = None
    is_transposed: bool = False


@dataclass(frozen=True)
class WeightRecord:
    """A weight or a table, in qsvd.json."""

    module: str
    shape: tuple[int, int]
    role: Role
    rank: int
    file: str
    residual_sha256: str
    source_digest: str = ""
    codec: str = ""
    tower: bool = False
    stack: str = ""
    sources: tuple[SourceRecord, ...] = ()


@dataclass(frozen=True)
class ManifestRecord:
    """The content of qsvd.json."""

    format: int
    fingerprint: str
    source: Mapping[str, Any]
    run: Mapping[str, Any]
    versions: Mapping[str, str]
    header: Mapping[str, Any]
    weights: Mapping[str, WeightRecord]
    tables: Mapping[str, WeightRecord] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    dtype: str = ""  # of most weights in the 16-bit model, where config.json has no place for it


def check_quantized(folder: Path) -> None:
    """Check that a folder is a complete quantized model.

    Raises:
        BadInput: qsvd quantize has not finished it, or did not write it.
    """
    if (folder / MANIFEST).is_file():
        return
    if (folder / UNFINISHED).is_dir():
        raise BadInput(f"{folder} is not finished; run the same qsvd quantize command again to complete it")
    raise BadInput(f"{folder} is not a quantized model: it has no {MANIFEST}; qsvd quantize MODEL --out OUT makes one")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return qsvd.json of a complete quantized model, with the fields of ManifestRecord.

    Raises:
        BadInput: the folder is not one, or the file has another format, or fields that do not belong together.
        Damaged: the file differs from its digest.
    """
    check_quantized(folder)
    path = folder / MANIFEST
    manifest = read_record(path, QUANTIZE_AGAIN, since=DIGESTS_SINCE)
    if manifest.get("format") not in FORMATS:
        raise BadInput(
            f"{path} has format {manifest.get('format')}; this version of qsvd reads 1 to {FORMATS[-1]}: install a "
            "newer one"
        )
    stored(ManifestRecord, manifest, f"{path} is damaged ({QUANTIZE_AGAIN})")
    packed = manifest["weights"] | manifest.get("tables", {})
    modules = Counter(weight["module"] for weight in packed.values())
    if twice := [module for module, count in modules.items() if count > 1]:
        raise BadInput(f"{path} is damaged: it has {listing(twice)} twice; {QUANTIZE_AGAIN}")
    if large := [name for name, weight in packed.items() if weight["rank"] > min(weight["shape"])]:
        raise BadInput(f"{path} is damaged: the ranks of {listing(large)} are above their sizes; {QUANTIZE_AGAIN}")
    return manifest


def read_errors(path: Path, manifest: Mapping[str, Any], advice: str) -> list[WeightError]:
    """Read errors.jsonl of a quantized model.

    Args:
        manifest: As `read_manifest` returns it.
        advice: What to do about a damaged file, for the sentence of an error.

    Raises:
        BadInput: the file does not exist, or a line is not an error.
        Damaged: it is not the file that was written with the manifest.
    """
    if not path.is_file():
        raise BadInput(f"{path} does not exist; {advice}")
    if manifest.get("files", {}).get(path.name, file_digest(path)) != file_digest(path):
        raise Damaged(f"{path} is damaged: its digest differs; {advice}")
    errors = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            errors.append(stored(WeightError, json.loads(line), "not a record of a weight's error"))
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{path}, line {number}: {error}; {advice}") from error
    return errors
