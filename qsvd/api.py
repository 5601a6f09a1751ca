"""The commands from Python: `qsvd.train("OUT", "data.jsonl", out="RUN", rank=16)` is `qsvd train OUT data.jsonl ...`.

Options are keyword arguments with the names of qsvd/options.py, which also has their defaults; names of other tools
that the command line takes (lr, max_steps) work here too. Paths are str or Path. A record of options works too:
`qsvd.quantize(Quantize("MODEL", out=Path("OUT")))`. Nothing is printed; progress=True shows progress on stderr.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from functools import wraps
from inspect import Parameter, Signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_origin, get_type_hints

from qsvd.errors import BadInput
from qsvd.method_options import with_method
from qsvd.option_file import from_names
from qsvd.option_types import POSITIONAL, PRINTS, Help, marks_of
from qsvd.options import (
    Aggregate,
    Allocate,
    Calibrate,
    Compare,
    Eval,
    Export,
    Plan,
    Prune,
    Quantize,
    Train,
    TrainingOptions,
)
from qsvd.prepare.check_options import check
from qsvd.records import ShowProgress, show_nothing

if TYPE_CHECKING:
    from qsvd.report.planning import Answer
    from qsvd.report.results import (
        AggregateResult,
        AllocateResult,
        CalibrateResult,
        CompareResult,
        EvalResult,
        ExportResult,
        PruneResult,
        QuantizeResult,
        TrainResult,
    )

Result = TypeVar("Result")


def takes(record: type) -> Callable[[Callable[[Any, ShowProgress], Result]], Callable[..., Result]]:
    """Return a decorator: a function of a record of options becomes one of the options as arguments."""

    def command_of(work: Callable[[Any, ShowProgress], Result]) -> Callable[..., Result]:
        name = work.__name__

        @wraps(work)
        def command(*given: Any, progress: bool = False, **options: Any) -> Result:
            is_record = len(given) == 1 and isinstance(given[0], record) and not options
            chosen = given[0] if is_record else options_of(record, name, given, options)
            _refuse_printing(name, chosen)
            check(chosen)  # before the command, and torch with it, is imported
            if not progress:
                return work(chosen, show_nothing)
            from qsvd.console.progress import display

            with display() as show:
                return work(chosen, show)

        command.__signature__ = signature_of(record, work)  # pyright: ignore[reportAttributeAccessIssue]
        command.__doc__ = f"{work.__doc__}\n\n{_described(record)}"
        return command

    return command_of


def options_of(record: type, name: str, given: Sequence[Any], options: Mapping[str, Any]) -> Any:
    """Return the record of options of a call, or raise BadInput: "qsvd.train needs data and out"."""
    places = [field.name for field in fields(record) if POSITIONAL in marks_of(record)[field.name]]
    if get_origin(get_type_hints(record)[places[0]]) is tuple:  # several models
        values = {places[0]: [item for one in given for item in (one if isinstance(one, list | tuple) else [one])]}
    elif len(given) > len(places):
        raise BadInput(f"qsvd.{name} takes {' and '.join(places)} by place, and all other options by name")
    else:
        values = dict(zip(places, given, strict=False))
    twice = [place for place in values if place in options and values[place]]
    if twice:
        raise BadInput(f"qsvd.{name} got {twice[0]} twice, by place and by name")
    plain = {key: _plain(value) for key, value in {**values, **options}.items()}
    if issubclass(record, TrainingOptions):
        record = with_method(record, plain)
    found = from_names(record, plain, f"qsvd.{name}")
    missing = [field.name for field in fields(record) if field.default is MISSING and field.name not in found]
    if missing:
        raise BadInput(f"qsvd.{name} needs {', '.join(missing)}")
    return record(**found)


def _plain(value: Any) -> Any:
    """Return a value as a file of options has it: a path as text, a tuple as a list."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _refuse_printing(name: str, options: Any) -> None:
    """Refuse options that say what the command prints."""
    marks = marks_of(type(options))
    given = [f.name for f in fields(options) if PRINTS in marks[f.name] and getattr(options, f.name) != f.default]
    if given:
        raise BadInput(f"qsvd.{name} prints nothing, so {given[0]} is an option of the command line only")


def signature_of(record: type, work: Callable[..., Any]) -> Signature:
    """Return the signature that help() and editors show: the options of a record, their types and defaults."""
    kinds, marks, parameters = get_type_hints(record), marks_of(record), list[Parameter]()
    for field in fields(record):
        if PRINTS in marks[field.name]:
            continue
        kind, place = kinds[field.name], Parameter.KEYWORD_ONLY
        if POSITIONAL in marks[field.name]:
            is_several = get_origin(kind) is tuple
            place = Parameter.VAR_POSITIONAL if is_several else Parameter.POSITIONAL_OR_KEYWORD
            kind = str | Path
        elif kind in (Path, Path | None):
            kind = str | kind
        default = Parameter.empty if field.default is MISSING else field.default
        parameters.append(Parameter(field.name, place, annotation=kind, default=default))
    parameters.append(Parameter("progress", Parameter.KEYWORD_ONLY, annotation=bool, default=False))
    parameters.sort(key=lambda parameter: parameter.kind)
    return Signature(parameters, return_annotation=work.__annotations__["return"])


def _described(record: type) -> str:
    """Return the options and their help, for help()."""
    lines = [
        f"    {name}: {next(mark.text for mark in reversed(marks) if isinstance(mark, Help))}"
        for name, marks in marks_of(record).items()
        if PRINTS not in marks
    ]
    return "\n".join(["Options:", *lines, "    progress: Show progress on stderr."])


@takes(Plan)
def plan(options: Plan, show: ShowProgress) -> "Answer":
    """Estimate memory and time, as `qsvd plan` does. The result says whether all fits (`fits`) and what lacks."""
    from qsvd.commands.plan import plan

    return plan(options, show)


@takes(Quantize)
def quantize(options: Quantize, show: ShowProgress) -> "QuantizeResult":
    """Quantize a 16-bit model, as `qsvd quantize` does. After an interruption the same call continues."""
    from qsvd.commands.quantize import quantize

    return quantize(options, show)


@takes(Calibrate)
def calibrate(options: Calibrate, show: ShowProgress) -> "CalibrateResult":
    """Estimate how sensitive the loss is to each weight, as `qsvd calibrate` does."""
    from qsvd.commands.calibrate import calibrate

    return calibrate(options, show)


@takes(Prune)
def prune(options: Prune, show: ShowProgress) -> "PruneResult":
    """Remove channels of the MLPs of a 16-bit model, as `qsvd prune` does."""
    from qsvd.commands.prune import prune

    return prune(options, show)


@takes(Allocate)
def allocate(options: Allocate, show: ShowProgress) -> "AllocateResult":
    """Choose bits and rank of each layer within a budget, as `qsvd allocate` does."""
    from qsvd.commands.allocate import allocate

    return allocate(options, show)


@takes(Train)
def train(options: Train, show: ShowProgress) -> "TrainResult":
    """Train an adapter of a quantized model, as `qsvd train` does."""
    from qsvd.commands.train import train

    return train(options, show)


@takes(Eval)
def evaluate(options: Eval, show: ShowProgress) -> "EvalResult":
    """Measure several models on one data set, as `qsvd eval` does: qsvd.evaluate("MODEL", "OUT", data="test.jsonl")."""
    from qsvd.commands.eval import evaluate

    return evaluate(options, show)


@takes(Compare)
def compare(options: Compare, show: ShowProgress) -> "CompareResult":
    """Compare splits and adapter methods at their best learning rates, as `qsvd compare` does."""
    from qsvd.commands.compare import compare

    return compare(options, show)


@takes(Aggregate)
def aggregate(options: Aggregate, show: ShowProgress) -> "AggregateResult":
    """Average runs on one quantized model, as `qsvd aggregate` does: qsvd.aggregate("RUN1", "RUN2", out="RUN")."""
    from qsvd.commands.aggregate import aggregate

    return aggregate(options, show)


@takes(Export)
def export(options: Export, show: ShowProgress) -> "ExportResult":
    """Write a run or a quantized model for other tools, as `qsvd export` does."""
    from qsvd.commands.export import export

    return export(options, show)
