"""What ends a command, and the pieces of the one sentence that it ends with.

A new exception is a subclass of QsvdError with its own exit code and one line on when to raise it. `BadInput` is the
only one for which the caller is to blame: an option, a file or a model that cannot be used, found before any slow work.
Any other ValueError is a fault of qsvd.

The sentences stand where the fault is found: of options and paths in prepare/check_options.py and inputs/, of numbers
in option_types.py, of models in files/check.py, of data in data/.
"""

import re
from collections.abc import Sequence

LIMIT = 5  # names shown; enough to see the pattern, short enough for one sentence


class QsvdError(Exception):
    """Ends a command with one sentence and an exit code."""

    exit_code = 1


class BadInput(QsvdError, ValueError):
    """An option, a file or a model cannot be used."""

    exit_code = 2


class Damaged(BadInput):
    """A file is not as qsvd wrote it, or was changed during a run."""

    exit_code = 1


class DoesNotFit(QsvdError):
    """There is too little disk space or memory for the work; known before it starts."""

    exit_code = 3


class NoResult(QsvdError):
    """What was measured is NaN or infinite."""


class TrainingStopped(QsvdError):
    """Training cannot go on: the first loss is too high, or a loss is NaN. Checkpoints are kept."""


class Interrupted(QsvdError):
    """The user asked to stop. Finished work is kept."""

    exit_code = 130


class ElsewhereFailed(QsvdError):
    """Another process of the same command failed, and said why; this one ends with its exit code.

    Args:
        code: The exit code of that process.
    """

    def __init__(self, code: int):
        super().__init__("another process of this command failed")
        self.exit_code = code


def listing(names: Sequence[str], limit: int = LIMIT, separator: str = ", ") -> str:
    """The first `limit` names, comma separated, and "and N more" if there are more."""
    shown = separator.join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def first_line(error: BaseException) -> str:
    """What an error says, without the pages that some libraries append; its class name if it says nothing.

    A first line that ends with a colon announces the second, and both are given.
    """
    first, *more = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {more[0].strip()}" if more and first.endswith(":") else first


# Text from outside: names, paths, data, sentences of libraries.
UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")  # steer a terminal


def visible(text: object) -> str:
    """Return a text with its control characters, marks of direction and half characters as escapes: \\x1b.

    Line breaks and tabs stay. A path of bytes that are not UTF-8 has half characters, which cannot be written.
    """
    return UNSEEN.sub(lambda found: ascii(found[0])[1:-1], str(text))


def one_line(text: object) -> str:
    """Return a text as `visible` does, with escapes for its line breaks and tabs, too."""
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")


# Sizes are written as people write them: 24GB, 24G and 24 are decimal, as on the label of a disk, 24GiB binary, as
# drivers count.
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
BINARY = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(text: str, flag: str, *, least: int = 1) -> int:
    """Bytes of "24GB", "24G", "24", "500 MB" or "1.5TiB"; a number alone is in GB.

    Args:
        flag: What the sentence of an error begins with, "--gpu".
        least: Bytes below which a size is refused.

    Raises:
        BadInput: the text is not a number, or a number and a unit, or is below `least`.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?", text.strip().upper())
    size = int(float(found[1]) * (UNITS | BINARY)[f"{found[2] or 'G'}B"]) if found else 0
    if not found or size < least:
        at_least = f" of at least {show_size(least)}" if least > 1 else ""
        raise BadInput(f"{flag} {text!r} is not a size{at_least}: give a number of GB, or one and KB, MB, GB or TB")
    return size


def show_size(num_bytes: int) -> str:
    """24 GB, 1.5 MB, 100 KB: in the largest unit that leaves at least 1, three digits."""
    for unit, size in reversed(UNITS.items()):
        if abs(num_bytes) >= size:
            return (
                f"{num_bytes / size:.3g} {unit}" if abs(num_bytes) < 1000 * size else f"{num_bytes / size:,.0f} {unit}"
            )
    return f"{num_bytes} bytes"
