"""run.json and steps.jsonl of a run, read and checked, without torch; the names of its records."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qsvd.errors import BadInput, Damaged
from qsvd.files.atomic import read_record, unsealed
from qsvd.files.workspace import ANOTHER_FOLDER, IDENTITY
from qsvd.records import Step, Texts, stored

START, STEPS, SUMMARY = "start.json", "steps.jsonl", "summary.json"
TEXTS = "texts.json"  # what the model writes before and after training; a page shows it, and no result depends on it
FILES = "files"  # of the summary: the digests of these files, if they are there
COMMAND, TOTAL = "command", "total_steps"  # of run.json: what a report shows; no result depends on them
FORMAT = 4  # of run.json; since then its files have digests


def read_identity(folder: Path) -> dict[str, Any] | None:
    """Return run.json; None if there is none."""
    path = folder / IDENTITY
    return read_record(path, ANOTHER_FOLDER, since=FORMAT) if path.is_file() else None


def read_steps(folder: Path, *, sealed: bool) -> list[Step]:
    """Return all steps so far, without a last line that a kill left incomplete.

    Raises:
        BadInput: a line is not a step.
        Damaged: a line differs from its digest, or is missing.
    """
    path = folder / STEPS
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    steps = []
    for number, line in enumerate(lines, start=1):
        where = f"line {number} of {path}"
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{where} is not valid JSON; {ANOTHER_FOLDER}") from error
        if isinstance(fields, dict):
            fields = unsealed(fields, line + b"\n", where, ANOTHER_FOLDER, sealed=sealed)
        step = stored(Step, fields, f"{where} is damaged ({ANOTHER_FOLDER})")
        if step.number != number:
            raise Damaged(f"{where} is step {step.number}, not step {number}: a line is missing; {ANOTHER_FOLDER}")
        steps.append(step)
    return steps


def read_texts(folder: Path) -> Texts | None:
    """Return texts.json; None if there is none."""
    path = folder / TEXTS
    if not path.is_file():
        return None
    return stored(Texts, read_record(path, ANOTHER_FOLDER), f"{path} is damaged ({ANOTHER_FOLDER})")


def shown_in(identity: Mapping[str, Any] | None) -> tuple[str, int | None]:
    """Return the command line of a run and its number of steps; "" and None where an older version wrote run.json."""
    command, total = ((identity or {}).get(name) for name in (COMMAND, TOTAL))
    return command if isinstance(command, str) else "", total if type(total) is int else None
