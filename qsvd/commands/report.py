"""`qsvd report`: print the error report of a complete quantized model, without torch; its card on the Hub."""

import json
import sys
from pathlib import Path

from qsvd.console.progress import say, terminal
from qsvd.errors import BadInput
from qsvd.files.atomic import read_object
from qsvd.files.workspace import ERRORS, MANIFEST, check_quantized
from qsvd.options import Report
from qsvd.records import Coverage, LeftTensors, WeightError
from qsvd.report.card import header_of
from qsvd.report.errors import from_record, to_json, to_terminal, totals_table
from qsvd.report.header import ReportHeader
from qsvd.report.next_commands import after_quantize, last_lines
from qsvd.report.readme import readme


def main(options: Report) -> None:
    """Print the report to stdout, as tables or as JSON."""
    folder = options.folder.expanduser()
    if options.json:
        say(json.dumps(to_json(*load_report(folder), worst_count=options.worst), indent=2))
    else:
        show_report(folder, worst=options.worst)
        say(last_lines("a quantized model", options.folder, after_quantize(options.folder)), file=sys.stderr)


def show_report(folder: Path, *, worst: int) -> None:
    """Print the tables of a quantized model, with so many of the worst layers."""
    terminal().print(to_terminal(*load_report(folder), worst_count=worst))


def load_report(folder: Path) -> tuple[ReportHeader, list[WeightError]]:
    """Read the header and the error of every layer of a quantized model.

    Raises:
        BadInput: the folder is not a complete quantized model, has random weights, or its files are damaged.
    """
    check_quantized(folder)
    try:
        header = json.loads((folder / MANIFEST).read_text())["header"]
        covered = header["coverage"]
        groups = {key: tuple(LeftTensors(**tensors) for tensors in covered.get(key, ())) for key in ("left", "unknown")}
        head = ReportHeader(**(header | {"coverage": Coverage(**(covered | groups))}))
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


def push_quantized(folder: Path, name: str) -> str:
    """Upload a complete quantized model: its card and its adapter name the repository. Return its address."""
    from qsvd.export.hub import named_base, upload  # with torch

    header, errors = load_report(folder)
    manifest, config = (read_object(folder / file) for file in (MANIFEST, "config.json"))
    widths = {weight["module"]: weight["shape"][1] for weight in manifest["weights"].values()}
    architecture, table = manifest["source"]["architecture"], totals_table(header, errors)
    text = readme(header, name, architecture, config["quantization_config"], widths, table)
    replaced = {"README.md": header_of((folder / "README.md").read_text(encoding="utf-8")) + text}
    return upload(folder, name, replaced | named_base(folder, name))
