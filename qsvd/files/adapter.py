"""A trained adapter on disk: qsvd_adapter.json, its record, and qsvd_adapter.safetensors, its parameters.

The parameters have the names of their places in the model, "model.layers.0.self_attn.q_proj.up". The frozen weights are
in the quantized model with the fingerprint of the record; the adapter is refused for another one.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from qsvd.errors import BadInput, Damaged
from qsvd.files.atomic import COPY_AGAIN, read_record, write_record, write_text
from qsvd.files.readers import check_contents, content_digest
from qsvd.files.safetensors import TensorEntry, new_tensors, read_header, write_stream
from qsvd.files.workspace import ADAPTER_RECORD, ADAPTER_SEALED, CHAT_TEMPLATE
from qsvd.records import stored

FORMAT = 4
FORMATS = (1, 2, 3, 4)  # of qsvd_adapter.json; 1 has no target_modules, dropout and rslora, 2 no own, 3 no digests
FIRST_ALPHA = 16.0  # of lora in format 1, if it was not given
PARAMETERS = "qsvd_adapter.safetensors"
FINGERPRINT = "qsvd_base_fingerprint"


@dataclass(frozen=True)
class AdapterRecord:
    """The settings of an adapter, and its quantized model.

    Args:
        base: Absolute path of the quantized model when the adapter was trained.
        fingerprint: SHA-256 of the residuals of the quantized model.
        method: Name of the method.
        rank: As given to the method; None for its default.
        alpha: The same for pissa and edora; for lora it is never None.
        dtype: Dtype of the trained parameters, "float32" or "bfloat16".
        seed: Seed of the initial values.
        labels: Names of the classes of a sequence classifier; empty for a language model.
        full: Names of the parameters of the model that are trained themselves, such as a new head.
        target_modules: Names or globs of the layers that are trained; empty is all.
        dropout, rslora: Of methods with LoRA's two factors.
        own: Options of the method's own, by name, that differ from their defaults.
        files: Digests of the files that were written with the record, by name.
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
    target_modules: tuple[str, ...] = ()
    dropout: float = 0.0
    rslora: bool = False
    own: Mapping[str, Any] = field(default_factory=dict, hash=False)
    files: Mapping[str, str] = field(default_factory=dict, hash=False, compare=False)
    format: int = FORMAT


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter, open for reading; chat_template is the one that it was trained with, if not the tokenizer's."""

    folder: Path
    record: AdapterRecord
    tensors: dict[str, TensorEntry]
    chat_template: str | None = None


def write_adapter(
    folder: Path, record: AdapterRecord, parameters: Mapping[str, Tensor], chat_template: str | None = None
) -> None:
    """Write all files, the record last: it marks a complete folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if chat_template is not None:
        write_text(folder / CHAT_TEMPLATE, chat_template)
    write_stream(folder / PARAMETERS, new_tensors(parameters), {"format": "pt", FINGERPRINT: record.fingerprint})
    names = [PARAMETERS] if chat_template is None else [PARAMETERS, CHAT_TEMPLATE]
    files = {name: content_digest(folder / name) for name in names}
    write_record(folder / ADAPTER_RECORD, asdict(record) | {"files": files})


def open_adapter(folder: Path) -> AdapterFolder:
    """Open an adapter that `write_adapter` wrote.

    Raises:
        BadInput: the folder holds no adapter, or its files are damaged or do not belong together.
    """
    record = read_adapter_record(folder)
    if not (folder / PARAMETERS).is_file():
        raise Damaged(f"{folder} lacks {PARAMETERS}; {COPY_AGAIN}")
    check_contents(folder, record.files, "qsvd train")
    header = read_header(folder / PARAMETERS)
    if header.metadata.get(FINGERPRINT) != record.fingerprint:
        raise BadInput(f"{folder / PARAMETERS} belongs to another run than {ADAPTER_RECORD}: their fingerprints differ")
    template = folder / CHAT_TEMPLATE
    own = template.read_text(encoding="utf-8") if template.is_file() else None
    return AdapterFolder(folder, record, header.tensors, own)


def read_adapter_record(folder: Path) -> AdapterRecord:
    """Return the record of an adapter; raise what `open_adapter` raises for it."""
    path = folder / ADAPTER_RECORD
    if not path.is_file():
        raise BadInput(
            f"{folder} holds no trained adapter (no {ADAPTER_RECORD}); give the folder of a run of qsvd train"
        )
    fields = read_record(path, since=ADAPTER_SEALED)
    if fields.get("format") not in FORMATS:  # checked first: another format may have other fields
        raise BadInput(
            f"{path} has format {fields.get('format')}; this version of qsvd reads formats 1 to {FORMAT}: install a "
            "newer one"
        )
    return _record(path, fields)


def _record(path: Path, fields: Mapping[str, Any]) -> AdapterRecord:
    """Return the record of these fields, in the newest format; a BadInput where they are not those of one."""
    record = replace(stored(AdapterRecord, fields, f"{path} is damaged"), format=FORMAT)
    if record.dtype not in ("float32", "bfloat16"):
        raise BadInput(f"{path} is damaged: dtype {record.dtype!r} is neither float32 nor bfloat16")
    if fields["format"] == 1 and record.method == "lora" and record.alpha is None:
        return replace(record, alpha=FIRST_ALPHA)
    return record


def check_base(adapter: AdapterFolder, folder: Path, fingerprint: str) -> None:
    """Refuse a quantized model that the adapter was not trained on, by BadInput."""
    if adapter.record.fingerprint != fingerprint:
        raise BadInput(
            f"{adapter.folder} was trained on another quantized model than {folder}: the fingerprints differ "
            f"({adapter.record.fingerprint[:12]} and {fingerprint[:12]}); it was trained on {adapter.record.base}"
        )
