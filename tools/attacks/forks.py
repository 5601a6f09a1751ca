"""Commands of qsvd in forks of this process, which has imported everything: each in a place of its own.

A place is a folder with the files that a command reads. What was in it before and what is in it afterwards is listed
with digests, so that a file that is lost, or a result that is another one, is seen.
"""

import contextlib
import hashlib
import importlib
import json
import os
import pkgutil
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

ADDRESS_SPACE = 24 * 2**30  # bytes; what a file with absurd numbers may ask for
CRASHED = 70  # exit code of a fork whose command has raised
CAPGET, CAPSET, CAPABILITIES = 125, 126, 0x20080522  # system calls of x86-64, and their version
BOUND_BY_MODES = 0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, with which root reads every file
DECLARED = {  # docs/format.md: what differs from run to run
    *("seconds", "peak_bytes", "first_step_seconds", "moved_bytes"),
    *("memory", "planned"),
}
WITH_DECLARED = {  # files with such numbers or with the path of the place, so that digests in them differ, too
    *("steps.jsonl", "summary.json", "start.json"),
    *("qsvd_adapter.json", "qsvd_files.json", "qsvd_export.json"),
}
DIGEST = re.compile(rb"\b[0-9a-f]{32}\b")

Listing = dict[str, str]


def import_everything() -> None:
    """Import what takes seconds, so that a fork does not have to; one thread."""
    import bitsandbytes
    import datasets
    import matplotlib.pyplot
    import peft
    import torch
    import transformers
    import trl

    torch.set_num_threads(1)
    for owner, names in (
        (transformers, ("AutoModelForCausalLM", "AutoTokenizer", "LlamaForCausalLM", "Trainer")),
        (trl, ("SFTTrainer",)),
        (peft, ("PeftModel",)),
    ):
        for name in names:
            getattr(owner, name)
    assert all((bitsandbytes, datasets, matplotlib)), "imported for the forks"
    package = importlib.import_module("qsvd")
    for module in pkgutil.walk_packages(package.__path__, "qsvd."):
        if not module.name.endswith("__main__"):
            with contextlib.suppress(ImportError):  # triton
                importlib.import_module(module.name)


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Args:
        code: Exit code, or minus the number of a signal.
        is_late: Whether it was stopped at the time limit.
    """

    code: int
    out: str
    err: str
    seconds: float
    is_late: bool = False


@dataclass
class Running:
    """A command in a fork."""

    process: int
    place: Path
    limit: float
    started: float = field(default_factory=time.monotonic)

    @property
    def has_ended(self) -> bool:
        """Return whether it has ended; nothing is lost by asking."""
        return os.waitid(os.P_PID, self.process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def kill(self) -> None:
        """End it by SIGKILL, and wait for that."""
        os.kill(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)

    def wait(self) -> Ended:
        """Wait until it ends. At its time limit it is killed."""
        while not self.has_ended and time.monotonic() - self.started < self.limit:
            time.sleep(0.005)
        seconds, is_late = time.monotonic() - self.started, not self.has_ended
        if is_late:
            os.kill(self.process, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
        out, err = (file.read_text(errors="replace") for file in logs(self.place))
        return Ended(code, out, err, seconds, is_late)

    def memory_and_files(self) -> tuple[int, int]:
        """Return its resident memory in bytes and the number of its open files."""
        folder = Path("/proc", str(self.process))
        resident = int(re.findall(r"VmRSS:\s+(\d+) kB", (folder / "status").read_text())[0])
        return 1024 * resident, len(list((folder / "fd").iterdir()))


def logs(place: Path) -> tuple[Path, Path]:
    """Return the files that a command in a place writes stdout and stderr into; they are beside the place."""
    return place.with_name(f"{place.name}.out"), place.with_name(f"{place.name}.err")


def start(
    words: Sequence[str],
    place: Path,
    *,
    limit: float,
    is_bound: bool = False,
    first: Callable[[], object] | None = None,
) -> Running:
    """Start a command in a place.

    Args:
        words: The command line; "load OUT" is `qsvd.load`, which prints a digest of logits.
        limit: Seconds.
        is_bound: Whether the modes of files hold for root, too.
        first: Is called in the fork before the command.
    """
    process = os.fork()
    if process:
        return Running(process, place, limit)
    code = CRASHED
    try:
        _redirect(place)
        os.chdir(place)
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if is_bound and not os.getuid():
            _give_up_reading_all()
        importlib.import_module("torch").set_num_threads(1)  # makes its pool anew; two threads at once would both do it
        if first is not None:
            first()
        code = _run(list(words))
    except BaseException:  # noqa: BLE001  # else the fork would go on as the parent
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _give_up_reading_all() -> None:
    import ctypes

    system = ctypes.CDLL(None).syscall
    head, sets = (ctypes.c_uint32 * 2)(CAPABILITIES, 0), (ctypes.c_uint32 * 6)()
    assert not system(CAPGET, head, sets), "it tells every process its own"
    sets[0] &= ~BOUND_BY_MODES  # of the effective ones
    assert not system(CAPSET, head, sets), "a process may give up what it has"


def _redirect(place: Path) -> None:
    for number, file in enumerate((Path(os.devnull), *logs(place))):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        opened = os.open(file, flags, 0o644)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115


def _run(words: list[str]) -> int:
    if words[0] == "load":
        return _load(words[1])
    try:
        importlib.import_module("qsvd.cli").main(words)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 0


def _load(folder: str) -> int:
    """Load a quantized model or a run as a program in Python does, and print a digest of its logits."""
    import torch

    import qsvd
    from qsvd.errors import QsvdError

    try:
        model = qsvd.load(folder, device="cpu", dtype=torch.float32)
    except (QsvdError, OSError) as error:
        print(f"qsvd: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[1, 30, 31, 32]])).logits
    print(hashlib.sha256(logits.numpy().tobytes()).hexdigest())
    return 0


def make_place(place: Path, subjects: Path, inputs: Mapping[str, str]) -> None:
    """Empty a place and copy subjects into it, with their times.

    Args:
        inputs: Name in the place -> name of the subject.
    """
    for path in (*logs(place), place.with_name(f"{place.name}.copy"), place):
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    place.mkdir(parents=True)
    for name, subject in inputs.items():
        source, target = subjects / subject, place / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, symlinks=True)
        else:
            shutil.copy2(source, target)


def walk(place: Path) -> Iterator[Path]:
    """Yield everything in a folder; links are not followed."""
    for folder, folders, files in os.walk(place):
        yield from (Path(folder, name) for name in sorted(folders + files))


def listing(place: Path) -> Listing:
    """Return what is in a place: path -> digest of a file, target of a link, or "folder"."""
    found = {}
    for path in walk(place):
        name = str(path.relative_to(place))
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        else:
            found[name] = "folder" if path.is_dir() else digest(path, place)
    return found


def digest(path: Path, place: Path) -> str:
    """Return the digest of a file, without the path of its place and without what differs from run to run."""
    try:
        content = path.read_bytes()
    except OSError as error:
        return f"unreadable: {error.strerror}"
    content = re.sub(re.escape(str(place.parent)).encode() + rb"/(\d+|made)", b"PLACE", content)
    if path.name in WITH_DECLARED:
        content = _without_declared(DIGEST.sub(b"DIGEST", content))
    return hashlib.sha256(content).hexdigest()


def _without_declared(content: bytes) -> bytes:
    """Return JSON or JSON lines without the numbers of a clock and of memory; what is not JSON as it is."""
    try:
        texts = [content] if content.startswith(b"{\n") else content.splitlines()
        tables = [json.loads(text) for text in texts]
        kept = [{name: value for name, value in table.items() if name not in DECLARED} for table in tables]
        return json.dumps(kept).encode()
    except (ValueError, AttributeError, RecursionError):
        return content


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Return whether a path is one of the patterns, or is inside a folder that is."""
    parts = name.split("/")
    heads = ["/".join(parts[: end + 1]) for end in range(len(parts))]
    return any(fnmatch(head, pattern) for pattern in patterns for head in heads)
