"""`qsvd report`: print the error report of a complete quantized model, without torch; its card on the Hub."""

import json
import sys
from pathlib import Path

from qsvd.console.progress import say, terminal
from qsvd.errors import BadInput
from qsvd.files.atomic import read_object
from qsvd.files.quantized.manifest import QUANTIZE_AGAIN, read_errors, read_manifest
from qsvd.files.workspace import ERRORS, MANIFEST
from qsvd.options import Report
from qsvd.records import WeightError, stored
from qsvd.report.card import header_of
from qsvd.report.errors import to_json, to_terminal, totals_table
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
    manifest = read_manifest(folder)
    head = stored(ReportHeader, manifest["header"], f"{folder / MANIFEST} is damaged")
    if head.iterations == 0:
        raise BadInput(f"{folder} was drawn at random: no weight was split, so there is no error to report")
    return head, read_errors(folder / ERRORS, manifest, QUANTIZE_AGAIN)


def push_quantized(folder: Path, name: str) -> str:
    """Upload a complete quantized model: its card and its adapter name the repository. Return its address."""
    from qsvd.export.hub import named_base, upload  # with torch

    header, errors = load_report(folder)
    manifest, config = read_manifest(folder), read_object(folder / "config.json")
    widths = {weight["module"]: weight["shape"][1] for weight in manifest["weights"].values()}
    architecture, table = manifest["source"]["architecture"], totals_table(header, errors)
    text = readme(header, name, architecture, config["quantization_config"], widths, table)
    replaced = {"README.md": header_of((folder / "README.md").read_text(encoding="utf-8")) + text}
    return upload(folder, name, replaced | named_base(folder, name))
