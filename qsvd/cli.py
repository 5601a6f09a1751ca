"""`qsvd COMMAND`: from arguments to an options record, from the record to its command, from an error to an exit code.

0 done, 1 runtime error, 2 bad input, 3 does not fit, 4 a fault of qsvd itself, 130 interrupted.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from typing import Any, NoReturn

import qsvd
from qsvd import ranks
from qsvd.arguments import checked, flags_of, meant
from qsvd.console.fault import Signals, report_fault
from qsvd.errors import BadInput, Interrupted, QsvdError, first_line, one_line
from qsvd.inputs.other_names import COMMANDS as OTHER_COMMANDS
from qsvd.method_options import with_method
from qsvd.option_file import from_names, take_config, yaml_mapping
from qsvd.option_form import read_words
from qsvd.options import (
    Aggregate,
    Allocate,
    Calibrate,
    Compare,
    Demo,
    Eval,
    Export,
    Generate,
    Methods,
    Plan,
    Prune,
    Quantize,
    Report,
    Train,
    TrainingOptions,
    Verify,
)
from qsvd.prepare.check_options import check

COMMANDS = {
    "plan": Plan,
    "allocate": Allocate,
    "calibrate": Calibrate,
    "prune": Prune,
    "quantize": Quantize,
    "train": Train,
    "generate": Generate,
    "eval": Eval,
    "compare": Compare,
    "aggregate": Aggregate,
    "export": Export,
    "report": Report,
    "verify": Verify,
    "methods": Methods,
    "demo": Demo,
}
DIVISIBLE = ("quantize", "train", "eval")  # several processes of torchrun do one command together
HELP = """usage: qsvd COMMAND [OPTIONS]

Quantize 16-bit models to 4 bits, keep the largest singular components in 16 bits, and fine-tune them.

commands:
{commands}

`qsvd COMMAND --help` lists the options of a command, `qsvd --version` prints the version.
Every command takes --config FILE.yaml with options by name; command-line options override the file."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit with its code."""
    code = run(list(sys.argv[1:] if arguments is None else arguments))
    if code and ranks.are_launched():  # torch would wait at the exit for processes that are gone
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    ranks.end()
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run one command; its exit code. An unknown command raises SystemExit(2), as argparse does."""
    if arguments == ["--version"]:
        print(f"qsvd {qsvd.__version__}")
        return 0
    stop = Signals()
    try:
        ranks.join()
        with alone_in_print():
            options = parse(arguments)
            check_divisible(_name_of(options))
            check(options)  # before the command, and torch with it, is imported
            command = import_module(f"qsvd.commands.{_name_of(options)}")
            with stop:
                command.main(options)
                ranks.leave()
                sys.stdout.flush()  # a full disk is found here, not when the interpreter ends
    except KeyboardInterrupt as stopped:
        return _fail(str(stopped) or "interrupted", 130)
    except Exception as error:  # noqa: BLE001  # whatever it is, it ends with a sentence
        if stop.asked and not isinstance(error, Interrupted):  # in an import, one exception becomes another
            return _fail("interrupted", 130)
        return _ended(error, arguments)
    return 0


def _ended(error: Exception, arguments: Sequence[str]) -> int:
    """Say in one sentence why a command ended; return its exit code."""
    if isinstance(error, QsvdError):
        return _fail(error, error.exit_code)
    if isinstance(error, BrokenPipeError):  # a reader such as `head` has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", 1)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return _fail(f"there is too little memory ({first_line(error)}); close other programs that use it", 3)
    return _fail(report_fault(error, arguments), 4)


def parse(arguments: list[str]) -> Any:
    """Return the options record of a command line. Help raises SystemExit(0), another command SystemExit(2).

    Raises:
        BadInput: an argument, or the file after --config, cannot be used; the sentence names every fault.
    """
    arguments, config = take_config(arguments)
    command, *rest = arguments or [""]
    if command not in COMMANDS:
        _explain(command)
    record = COMMANDS[command]
    is_help = bool({"-h", "--help"} & {*rest})
    given = {} if config is None else yaml_mapping(config)
    if issubclass(record, TrainingOptions):
        record = with_method(record, {**given, **flags_of(rest)}, is_help=is_help)
    defaults = {} if config is None else from_names(record, given, f"--config {config}")
    if not is_help:
        rest = checked(f"qsvd {command}", record, rest, defaults)
    return read_words(record, rest, defaults, f"qsvd {command}")


def _explain(command: str) -> NoReturn:
    """Print the commands, or that there is no such command, and exit."""
    lines = [f"  {name:<10} {str(record.__doc__).splitlines()[0]}" for name, record in COMMANDS.items()]
    text = HELP.format(commands="\n".join(lines))
    if command in ("-h", "--help"):
        print(text)
        sys.exit(0)
    ours = OTHER_COMMANDS.get(command.replace("_", "-").lower())
    instead = f": use {ours}" if ours else f"{meant(command, COMMANDS)}; the commands are {', '.join(COMMANDS)}"
    print(f"qsvd: there is no command {command!r}{instead}" if command else text, file=sys.stderr)
    sys.exit(2)


def _name_of(options: object) -> str:
    return next(name for name, record in COMMANDS.items() if isinstance(options, record))


@contextmanager
def alone_in_print() -> Iterator[None]:
    """Silence this process if it is not the first one of several."""
    if ranks.is_main():
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def check_divisible(command: str) -> None:
    """Refuse several processes for a command that cannot divide its work."""
    if ranks.size() > 1 and command not in DIVISIBLE:
        raise BadInput(f"qsvd {command} runs in one process: start it without torchrun")


def _fail(reason: object, code: int) -> int:
    """Say in a line why the command ends, unless another process has said so; return the exit code."""
    sentence = one_line(reason)
    is_first, code = ranks.fail(sentence, code)
    ranks.forget()
    if is_first:
        print(f"qsvd: {sentence}", file=sys.stderr)
    return code
