"""`qsvd` and `python -m qsvd`. Ctrl-C and SIGTERM end it in a line from here on, while the command is imported too."""

import os
import signal
from types import FrameType


def main() -> None:
    """Run the command line and exit with its code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    from qsvd.cli import main as run

    run()


def _leave(_number: int, _frame: FrameType | None) -> None:
    if os.environ.get("RANK", "0") == "0":  # of several processes the first one speaks
        os.write(2, b"qsvd: interrupted\n")
    os._exit(130)  # nothing is written yet; an exception in an import can become another one


if __name__ == "__main__":
    main()
