"""`qsvd COMMAND`: flags to an options record, the record to its command, and what went wrong to an exit code.

0 done, 1 failed while running, 2 bad input, 3 does not fit, 130 interrupted.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, fields
from importlib import import_module
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

import qsvd
from qsvd.errors import BadInput, QsvdError
from qsvd.options import Allocate, Calibrate, Demo, Eval, Export, Plan, Quantize, Report, Train

COMMANDS = {
    "plan": Plan,
    "allocate": Allocate,
    "calibrate": Calibrate,
    "quantize": Quantize,
    "train": Train,
    "eval": Eval,
    "export": Export,
    "report": Report,
    "demo": Demo,
}
ABOUT = """Split 16-bit checkpoints into principal components in high precision and a 4-bit residual.

Every command takes --config FILE.yaml, flags by name; flags on the command line win."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit with its code."""
    sys.exit(run(list(sys.argv[1:] if arguments is None else arguments)))


def run(arguments: list[str]) -> int:
    """Run one command; its exit code. Bad flags raise SystemExit(2), as argparse does."""
    if arguments == ["--version"]:
        print(f"qsvd {qsvd.__version__}")
        return 0
    try:
        options = parse(arguments)
        command = import_module(f"qsvd.commands.{_name_of(options)}")
        command.main(options)
    except QsvdError as error:
        return _fail(error, error.exit_code)
    except BrokenPipeError:  # a reader such as `head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except Exception as error:
        error.add_note("This is a fault of qsvd: please report it with the lines above.")
        raise
    return 0


def parse(arguments: list[str]) -> Any:
    """The options record of a command line.

    Raises:
        BadInput: the file after --config cannot be used.
    """
    arguments, config = _take_config(arguments)
    command = arguments[0] if arguments else ""
    variants = []
    for name, record in COMMANDS.items():
        if config is not None and name == command:
            chosen = tyro.conf.subcommand(name, default=_from_yaml(record, config))
        else:
            chosen = tyro.conf.subcommand(name)
        variants.append(Annotated[record, chosen])
    marks = (tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes)
    union: Any = Union[tuple(variants)]  # noqa: UP007  # of a list made at run time
    return tyro.cli(union, args=arguments, prog="qsvd", description=ABOUT, config=marks)


def _take_config(arguments: list[str]) -> tuple[list[str], Path | None]:
    """The arguments without --config FILE, and the file."""
    for number, argument in enumerate(arguments):
        flag, joined, value = argument.partition("=")
        if flag == "--config":
            values = [value] if joined else arguments[number + 1 : number + 2]
            if not any(values):
                raise BadInput("--config needs a YAML file after it")
            rest = number + (1 if joined else 2)
            return arguments[:number] + arguments[rest:], Path(values[0]).expanduser()
    return arguments, None


def _from_yaml(record: type, file: Path) -> Any:
    """An options record with the values of a YAML file; what the file lacks stays at its default, or to be given."""
    values = _yaml_mapping(file)
    values = {str(name).replace("-", "_"): value for name, value in values.items()}
    types = get_type_hints(record)
    names = [field.name for field in fields(record)]
    wrong = [f"unknown option {name!r} (known: {', '.join(names)})" for name in values if name not in names]
    checked = {}
    for name in names:
        if name in values:
            try:
                checked[name] = _as(types[name], values[name])
            except TypeError as error:
                wrong.append(f"{name} {error}")
    if wrong:
        raise BadInput(f"--config {file}: {'; '.join(wrong)}")
    missing = {field.name: tyro.MISSING for field in fields(record) if field.default is MISSING}
    return record(**(missing | checked))


def _yaml_mapping(file: Path) -> Mapping[Any, Any]:
    import yaml

    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadInput(f"--config {file}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--config {file} cannot be read as a text file: {error}") from error
    except yaml.YAMLError as error:
        raise BadInput(f"--config {file} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, Mapping):
        raise BadInput(f"--config {file} must hold `name: value` lines")
    return values


def _as(kind: Any, value: Any) -> Any:
    """A YAML value as an option's type; TypeError says what is allowed."""
    if get_origin(kind) is UnionType:  # X | None
        return None if value is None else _as(get_args(kind)[0], value)
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise TypeError(f"is {value!r}, not one of {', '.join(map(str, get_args(kind)))}")
        return value
    if get_origin(kind) is tuple:
        items = value if isinstance(value, list) else [value]
        return tuple(_as(get_args(kind)[0], item) for item in items)
    if kind is float:
        return _as_float(value)
    wanted = str if kind is Path else kind
    if type(value) is not wanted:
        raise TypeError(f"is {value!r}, not of type {wanted.__name__}")
    return kind(value)


def _as_float(value: Any) -> float:
    """A number; YAML 1.1 takes 2 for an integer and 2e-5, without a dot, for a text."""
    if type(value) in (int, float, str):
        with suppress(ValueError):
            return float(value)
    raise TypeError(f"is {value!r}, not of type float")


def _name_of(options: object) -> str:
    return next(name for name, record in COMMANDS.items() if type(options) is record)


def _fail(reason: object, code: int) -> int:
    print(f"qsvd: {reason}", file=sys.stderr)
    return code
