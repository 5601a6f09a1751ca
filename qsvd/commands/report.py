"""`qsvd report`: the error report of a result, again."""

import json
from pathlib import Path

from rich.console import Console

from qsvd.errors import BadInput
from qsvd.files.workspace import ERRORS, MANIFEST, UNFINISHED
from qsvd.options import Report
from qsvd.records import Coverage, LeftTensors, WeightError
from qsvd.report.errors import from_record, to_json, to_terminal
from qsvd.report.header import ReportHeader


def main(options: Report) -> None:
    """Print the report to stdout, as tables or as JSON."""
    if options.worst < 0:
        raise BadInput(f"--worst {options.worst} is negative; give 0 or more weights to list")
    folder = options.folder.expanduser()
    if options.json:
        print(json.dumps(to_json(*load_report(folder), worst_count=options.worst), indent=2))
        return
    show_report(folder, worst=options.worst)


def show_report(folder: Path, *, worst: int) -> None:
    """Print the tables of a result."""
    Console().print(to_terminal(*load_report(folder), worst_count=worst))


def load_report(folder: Path) -> tuple[ReportHeader, list[WeightError]]:
    """The head and the records of a result.

    Raises:
        BadInput: the folder is no complete result, was drawn instead of split, or its files are damaged.
    """
    if not (folder / MANIFEST).is_file():
        if (folder / UNFINISHED).is_dir():
            raise BadInput(f"{folder} is not finished; run the same qsvd quantize command again to complete it")
        raise BadInput(f"{folder} is no result of qsvd quantize: it has no {MANIFEST}")
    try:
        header = json.loads((folder / MANIFEST).read_text())["header"]
        covered = header["coverage"]
        left = tuple(LeftTensors(**tensors) for tensors in covered["left"])
        head = ReportHeader(**(header | {"coverage": Coverage(**(covered | {"left": left}))}))
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{folder / MANIFEST} is damaged: {error}") from error
    if head.iterations == 0:
        raise BadInput(f"{folder} was drawn at random: no weight was split, so there is no error to report")
    errors = []
    for number, line in enumerate((folder / ERRORS).read_text().splitlines(), start=1):
        try:
            errors.append(from_record(json.loads(line)))
        except ValueError as error:
            raise BadInput(f"{folder / ERRORS}, line {number}: {error}") from error
    return head, errors
