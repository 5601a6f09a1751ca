"""What is trained, on disk: qsvd_adapter.json, a record, and qsvd_adapter.safetensors, the parameters.

The parameters are named by their place in the model, "model.layers.0.self_attn.q_proj.up". What is frozen is in the
base, which the fingerprint names; the folder is useless with another one, and refused.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from qsvd.errors import BadInput
from qsvd.files.atomic import write_text
from qsvd.files.safetensors import DTYPE_NAMES, NewTensor, TensorEntry, read_header, write_stream

FORMAT = 1
RECORD = "qsvd_adapter.json"
PARAMETERS = "qsvd_adapter.safetensors"
FINGERPRINT = "qsvd_base_fingerprint"


@dataclass(frozen=True)
class AdapterRecord:
    """Which adapter it is, and of which base.

    Args:
        base: Folder of the base, absolute, where it was when the adapter was trained.
        fingerprint: Of the base's residuals.
        method: Name of the method; rank and alpha are what it was told, None for its own choice.
        dtype: Of the trained parameters, "float32" or "bfloat16".
        seed: Of what was drawn at the start.
        labels: Names of the classes of a sequence classifier; none for a language model.
        full: Parameters of the model that are trained as they are, such as a new head.
    """

    base: str
    fingerprint: str
    method: str
    rank: int | None
    alpha: float | None
    dtype: str
    seed: int
    labels: tuple[str, ...] = ()
    full: tuple[str, ...] = ()
    format: int = FORMAT


@dataclass(frozen=True)
class AdapterFolder:
    """A folder with an adapter, open for reading."""

    folder: Path
    record: AdapterRecord
    tensors: dict[str, TensorEntry]


def write_adapter(folder: Path, record: AdapterRecord, parameters: Mapping[str, Tensor]) -> None:
    """Write both files, the record last: where it is, the folder is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    new = [NewTensor(name, DTYPE_NAMES[t.dtype], tuple(t.shape), t.detach()) for name, t in parameters.items()]
    write_stream(folder / PARAMETERS, new, {"format": "pt", FINGERPRINT: record.fingerprint})
    write_text(folder / RECORD, json.dumps(asdict(record), indent=2) + "\n")


def open_adapter(folder: Path) -> AdapterFolder:
    """Open what `write_adapter` wrote.

    Raises:
        BadInput: the folder holds no adapter of qsvd, or its files are damaged or do not belong together.
    """
    path = folder / RECORD
    if not path.is_file():
        raise BadInput(f"{folder} holds no trained adapter: it has no {RECORD}; give a run of qsvd train")
    record = _read_record(path)
    if not (folder / PARAMETERS).is_file():
        raise BadInput(f"{folder} is incomplete: it has no {PARAMETERS}")
    header = read_header(folder / PARAMETERS)
    if header.metadata.get(FINGERPRINT) != record.fingerprint:
        raise BadInput(f"{folder / PARAMETERS} belongs to another run than {RECORD} beside it: fingerprints differ")
    return AdapterFolder(folder, record, header.tensors)


def _read_record(path: Path) -> AdapterRecord:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields["format"] != FORMAT:  # looked at first: another format may have other fields
            raise BadInput(f"{path} has format {fields['format']}; this version of qsvd reads format {FORMAT}")
        record = AdapterRecord(**(fields | {name: tuple(fields[name]) for name in ("labels", "full")}))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise BadInput(f"{path} is damaged: {error}") from error
    if record.dtype not in ("float32", "bfloat16"):
        raise BadInput(f"{path} is damaged: dtype {record.dtype!r} is neither float32 nor bfloat16")
    return record


def check_base(adapter: AdapterFolder, folder: Path, fingerprint: str) -> None:
    """Refuse a base that the adapter was not trained on.

    Raises:
        BadInput: the fingerprints differ.
    """
    if adapter.record.fingerprint != fingerprint:
        raise BadInput(
            f"{adapter.folder} was trained on another residual than {folder}: the fingerprints differ "
            f"({adapter.record.fingerprint[:12]} and {fingerprint[:12]}); its base was {adapter.record.base}"
        )
