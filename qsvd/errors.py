"""What fits into the one sentence of an error: the first few names, the first line of another library's error."""

import re
from collections.abc import Sequence

LIMIT = 5  # names shown; enough to see the pattern, short enough for one sentence


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


# Sizes as people write them: "24GB", decimal as on the label of a disk, or "24GiB", as drivers and systems count.


UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
BINARY = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(text: str, flag: str, *, least: int = 1) -> int:
    """Bytes of "24GB", "500 MB" or "1.5TiB".

    Args:
        flag: What the sentence of an error begins with, "--gpu".
        least: Bytes below which a size is refused.

    Raises:
        ValueError: the text is not a number and a unit, or is below `least`.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?B)", text.strip().upper())
    size = int(float(found[1]) * (UNITS | BINARY)[found[2]]) if found else 0
    if not found or size < least:
        at_least = f" of at least {show_size(least)}" if least > 1 else ""
        raise ValueError(f"{flag} {text!r} is no size{at_least}: give a number and KB, MB, GB or TB, such as 24GB")
    return size


def show_size(num_bytes: int) -> str:
    """24 GB, 1.5 MB, 100 KB: in the largest unit that leaves at least 1, three digits."""
    for unit, size in reversed(UNITS.items()):
        if abs(num_bytes) >= size:
            return (
                f"{num_bytes / size:.3g} {unit}" if abs(num_bytes) < 1000 * size else f"{num_bytes / size:,.0f} {unit}"
            )
    return f"{num_bytes} bytes"


# What ends a command early, and its exit code: 0 done, 1 failed while running, 2 bad input, 3 does not fit,


class DoesNotFit(Exception):
    """There is not enough disk or memory for the work, known before it starts."""


class Interrupted(Exception):
    """The user asked to stop; what is finished is kept."""


# What ends a training run by itself.


class TrainingStopped(Exception):
    """The run cannot go on: an absurd start, a loss that is no number. What was saved before is kept."""
