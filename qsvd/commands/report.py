"""`qsvd report`: the error of a quantized model as tables, or a page of models and runs, without torch; its card."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from qsvd.console.progress import say, terminal
from qsvd.errors import BadInput, listing
from qsvd.files.atomic import is_locked, read_object, write_text
from qsvd.files.quantized.manifest import QUANTIZE_AGAIN, read_errors, read_manifest
from qsvd.files.workspace import ERRORS, LOCK, MANIFEST, REPORT
from qsvd.options import Report
from qsvd.prepare.using.pages import subject_of
from qsvd.records import WeightError, stored
from qsvd.report.card import header_of
from qsvd.report.errors import to_json, to_terminal, totals_table
from qsvd.report.header import ReportHeader
from qsvd.report.next_commands import after_quantize, last_lines
from qsvd.report.page.document import GENERATOR, Subject, subject_page
from qsvd.report.page.together import together_page
from qsvd.report.readme import readme

PAUSE = 3  # seconds between two pages of --live


def main(options: Report) -> None:
    """Print the report to stdout, as tables or as JSON, or write a page."""
    if options.html is not None:
        write_pages(options)
        return
    folder = options.folders[0].expanduser()
    if options.json:
        say(json.dumps(to_json(*load_report(folder), worst_count=options.worst), indent=2))
    else:
        show_report(folder, worst=options.worst)
        say(last_lines("a quantized model", options.folders[0], after_quantize(options.folders[0])), file=sys.stderr)


def write_pages(options: Report) -> None:
    """Write the page of --html; with --live again until all runs are finished or nobody trains them, or until Ctrl-C.

    Raises:
        BadInput: a folder is not a quantized model or a run, or the page would replace another file.
    """
    folders = [folder.expanduser() for folder in options.folders]
    assert options.html is not None, "main asks for a page only then"
    out = folders[0] / REPORT if str(options.html) == "auto" else options.html.expanduser()
    check_replaced(out)
    seen, is_live = list[Subject](), options.live
    while True:
        are_trained = any(is_locked(folder / LOCK) for folder in folders)  # first: who ends writes the summary before
        subjects = [subject_of(folder) for folder in folders]
        are_left = is_live and not are_trained and subjects == seen
        is_live = is_live and not are_left and not all(subject.is_finished for subject in subjects)
        if len(subjects) == 1:
            page = subject_page(subjects[0], is_live=is_live)
        else:
            page = together_page([folder.resolve().name for folder in folders], subjects, is_live=is_live)
        write_text(out, page)
        if not is_live:
            break
        seen = subjects
        time.sleep(PAUSE)
    if are_left:
        _say_left(folders, subjects)
    say(out)
    say(last_lines("a page", out), file=sys.stderr)


def _say_left(folders: Sequence[Path], subjects: Sequence[Subject]) -> None:
    """Say which runs are not finished although no process trains them."""
    left = [str(folder) for folder, subject in zip(folders, subjects, strict=True) if not subject.is_finished]
    say(
        f"not finished, and no process trains {listing(left)}: give the same qsvd train command again, which goes on "
        "from the last checkpoint, and then this command",
        file=sys.stderr,
    )


def check_replaced(out: Path) -> None:
    """Refuse a place for a page that is a folder, or a file that is not a page of qsvd.

    Raises:
        BadInput: it is.
    """
    if out.is_dir():
        raise BadInput(f"--html {out} is a folder; give a file, such as {out / REPORT}")
    if not out.parent.is_dir():
        raise BadInput(f"--html {out}: there is no folder {out.parent}; make it first")
    if out.is_file():
        with out.open("rb") as file:
            if GENERATOR.encode() not in file.read(4096):
                raise BadInput(f"--html {out} is there and is not a page of qsvd report; give another file")


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
