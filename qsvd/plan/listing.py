"""What fits into the one sentence of an error: the first few names, the first line of another library's error."""

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
