"""What ends a command that did not foresee it: signals, and faults of qsvd itself, with a report in a file."""

import os
import platform
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType

from qsvd import ranks
from qsvd.errors import first_line, one_line

PACKAGES = ("qsvd", "torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "tokenizers")
SECRET_NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|KEY|CREDENTIAL", re.IGNORECASE)  # of the environment
TOKENS = re.compile(r"hf_\w{8,}|(?<=://)[^/\s@]+(?=@)")
ENDED = "ended by torchrun, as when one of the processes dies; the same command goes on from what is finished"
LEAST_SECRET = 6  # characters


class Signals:
    """In a `with` block, the first Ctrl-C or SIGTERM raises KeyboardInterrupt, and the next one ends the process.

    Of several processes, SIGTERM is from torchrun, which sends it, maybe twice, when another process has ended: the
    second one, and one after the block, are ignored.
    """

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "Signals":
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if ranks.size() > 1:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if ranks.size() > 1 and number == signal.SIGTERM:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self.asked = True
            raise KeyboardInterrupt(ENDED)
        if self.asked:
            os.write(2, b"qsvd: interrupted, and stopped at once\n")
            os._exit(130)
        self.asked = True
        raise KeyboardInterrupt


def report_fault(error: BaseException, arguments: Sequence[str]) -> str:
    """Write the traceback of a fault of qsvd to a new file; return the sentence that names command, file and report.

    Args:
        arguments: The command line; tokens of the Hub and other secrets of the environment are left out.
    """
    command = f"qsvd {arguments[0]}" if arguments else "qsvd"
    path = in_hand(error)
    where = f" with {path}" if path else ""
    kind = type(error).__name__
    reason = without_secrets(f"{kind}: {first_line(error)}" if str(error) else kind)
    sentence = f"a fault of qsvd itself in `{command}`{where}: {reason}"
    report = _write(without_secrets(_text(error, command, arguments)))
    return f"{sentence}; please report it with {report or 'all that it printed: no folder takes a report file'}"


def in_hand(error: BaseException) -> Path | None:
    """Return the path that the innermost function of qsvd worked with when it failed; None if it had none."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    for frame in reversed([f for f in frames if f.f_globals.get("__name__", "").startswith("qsvd.")]):
        for value in frame.f_locals.values():
            if isinstance(value, Path):
                return value
    return None


def without_secrets(text: str) -> str:
    """Return a text with tokens, and values of variables of the environment such as HF_TOKEN, as ***."""
    for name, value in os.environ.items():
        if SECRET_NAMES.search(name) and len(value) >= LEAST_SECRET:
            text = text.replace(value, "***")
    return TOKENS.sub("***", text)


def _text(error: BaseException, command: str, arguments: Sequence[str]) -> str:
    found = []
    for name in PACKAGES:
        with suppress(PackageNotFoundError, OSError):
            found.append(f"{name} {version(name)}")
    lines = [
        f"A fault of qsvd itself in `{command}`, {time.strftime('%Y-%m-%d %H:%M:%S %z')}",
        f"command line: qsvd {' '.join(map(one_line, arguments))}",
        f"versions: {', '.join(found)}",
        f"Python {sys.version.split()[0]}, {platform.platform()}",
        "",
    ]
    return "\n".join(lines) + "".join(traceback.format_exception(error))


def _write(text: str) -> Path | None:
    """Write a new file in the current folder, else in the temporary one; None if neither takes it."""
    prefix = time.strftime("qsvd-fault-%Y%m%d-%H%M%S-")
    for folder in (".", tempfile.gettempdir()):
        try:
            opened, name = tempfile.mkstemp(prefix=prefix, suffix=".txt", dir=folder)
        except OSError:
            continue
        try:
            with os.fdopen(opened, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
            return Path(name)
        except OSError:  # a full disk
            os.unlink(name)
    return None
