"""What `qsvd report --html` shows of a folder: its records, read and checked without torch.

A kind of folder is one line of KINDS: the file that tells it, and the function that returns its Subject.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qsvd.errors import BadInput, first_line
from qsvd.files.atomic import read_record
from qsvd.files.quantized.manifest import QUANTIZE_AGAIN, read_errors, read_manifest
from qsvd.files.quantized.spectrum import kept_values
from qsvd.files.trained.records import FILES, START, SUMMARY, read_identity, read_steps, read_texts, shown_in
from qsvd.files.workspace import ANOTHER_FOLDER, ERRORS, IDENTITY, MANIFEST
from qsvd.records import Start, WeightError, stored
from qsvd.report.header import ReportHeader
from qsvd.report.page.comparison import comparison_subject
from qsvd.report.page.document import Subject
from qsvd.report.page.quantized import quantized_subject, spectrum_layers
from qsvd.report.page.run import RunRecords, run_subject
from qsvd.report.training import RunSummary


@dataclass(frozen=True)
class Kind:
    """A kind of folder.

    Args:
        file: The file that such a folder has.
        words: What it is.
        subject: Reads it.
    """

    file: str
    words: str
    subject: Callable[[Path], Subject]


def subject_of(folder: Path) -> Subject:
    """Return what a page shows of a folder.

    Raises:
        BadInput: it is of no kind of KINDS, or a file is damaged.
    """
    if not folder.is_dir():
        raise BadInput(f"no folder {folder} here; give a quantized model, a run or a comparison")
    kind = next((kind for kind in KINDS if (folder / kind.file).is_file()), None)
    if kind is None:
        wanted = " nor ".join(f"{kind.file} of {kind.words}" for kind in KINDS)
        raise BadInput(
            f"{folder} has neither {wanted}: give a folder that qsvd quantize, qsvd train or qsvd compare wrote"
        )
    return kind.subject(folder)


def quantized_page_of(folder: Path, header: ReportHeader, errors: Sequence[WeightError]) -> Subject:
    """Return what a page shows of a quantized model whose tensors are written."""
    num_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return quantized_subject(header, errors, num_bytes, kept_values(folder, spectrum_layers(errors)))


def _quantized(folder: Path) -> Subject:
    manifest = read_manifest(folder)
    header = stored(ReportHeader, manifest["header"], f"{folder / MANIFEST} is damaged")
    errors = read_errors(folder / ERRORS, manifest, QUANTIZE_AGAIN) if header.iterations else []
    return quantized_page_of(folder, header, errors)


def _run(folder: Path) -> Subject:
    identity = read_identity(folder)
    is_sealed = "format" in (identity or {})
    start, summary = (
        read_record(folder / name, ANOTHER_FOLDER, since=0 if is_sealed else 1) if (folder / name).is_file() else None
        for name in (START, SUMMARY)
    )
    if summary is not None:
        summary = {name: value for name, value in summary.items() if name != FILES}
    found = RunRecords(
        None if start is None else stored(Start, start, f"{folder / START} is damaged"),
        read_steps(folder, sealed=is_sealed),
        None if summary is None else stored(RunSummary, summary, f"{folder / SUMMARY} is damaged"),
        *shown_in(identity),
        read_texts(folder),
    )
    return run_subject(folder.resolve().name, found)


def _comparison(folder: Path) -> Subject:
    path = folder / RESULTS
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        kinds = {kind: [one for one in records if one["kind"] == kind] for kind in ("comparison", "row", "left out")}
        (head,) = kinds["comparison"]
        return comparison_subject(folder.resolve().name, head, kinds["row"], kinds["left out"])
    except (ValueError, KeyError, TypeError) as error:
        again = "give the command of qsvd compare again, which writes it from the finished cells"
        raise BadInput(f"{path} is damaged ({type(error).__name__}: {first_line(error)}); {again}") from error


RESULTS = "results.jsonl"
KINDS = (
    Kind(MANIFEST, "a quantized model", _quantized),
    Kind(IDENTITY, "a run", _run),
    Kind(RESULTS, "a comparison", _comparison),
)
