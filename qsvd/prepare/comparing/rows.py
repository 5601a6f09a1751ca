"""Rows of a comparison: "lora --rslora" as options of `qsvd train`, "--quality good" as options of `qsvd quantize`.

Both are read as the command line reads them. No model is opened here.
"""

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from qsvd.adapters.methods.table import METHODS, with_options
from qsvd.arguments import checked, flags_of, meant
from qsvd.errors import BadInput
from qsvd.files.atomic import file_sha256
from qsvd.option_form import read_words
from qsvd.option_types import SAME_RESULT, marks_of
from qsvd.options import Compare, Quantize, Train
from qsvd.options.comparing import ALL
from qsvd.prepare.check_options import check

SHARED = (  # options that all rows have in common
    *("epochs", "steps", "batch_size", "accumulate"),
    *("task", "chat_template", "max_length", "loss_on", "map", "dtype", "device"),
)
FIXED = ("seed", "split", "held_out", "max_length", "loss_on", "map", "dtype", "device", "packing")  # of every row
RANKS = ("budget", "allocation", "rank")  # options of a split that set its ranks


@dataclass(frozen=True)
class SplitSpec:
    """Options of `qsvd quantize` for one split.

    Args:
        text: As it was given.
        options: Its model is that of the comparison; `out` is set when it is known.
        has_rank: Whether the ranks are given; else each method has the one that it needs.
    """

    text: str
    options: Quantize
    has_rank: bool

    @property
    def is_mixed(self) -> bool:
        """Whether layers may have different ranks."""
        return self.options.budget is not None or self.options.allocation is not None


@dataclass(frozen=True)
class MethodSpec:
    """Options of `qsvd train` for one method.

    Args:
        text: As it was given.
        options: Base, data, folder, rate and seed are those of a run, and set when they are known.
    """

    text: str
    options: Train

    @property
    def method(self) -> str:
        return self.options.method


def read_specs(options: Compare) -> tuple[list[SplitSpec], list[MethodSpec]]:
    """Return the splits and the methods of a comparison.

    Raises:
        BadInput: a spec cannot be read, or a value in it cannot be used; the sentence names every fault.
    """
    wrong: list[str] = []
    splits = [_read(f"--splits {text!r}", _split, options, text, wrong) for text in tidy(options.splits) or ("",)]
    texts = [*dict.fromkeys(one for text in tidy(options.methods) for one in (METHODS if text == ALL else (text,)))]
    methods = [_read(f"--methods {text!r}", _method, options, text, wrong) for text in texts]
    if not texts:
        wrong.append("--methods is empty: name at least one method")
    if wrong:
        raise BadInput("; ".join(wrong))
    return splits, methods


def is_named(options: Compare, spec: MethodSpec) -> bool:
    """Return whether a method was named, and not only meant by "all"."""
    return spec.text in tidy(options.methods)


def tidy(texts: Sequence[str]) -> list[str]:
    """Return specs with one space between words."""
    return [" ".join(text.split()) for text in texts]


def _read(name: str, read: Any, options: Compare, text: str, wrong: list[str]) -> Any:
    """Return what `read` makes of a text; add why it cannot be read."""
    try:
        return read(options, text)
    except ValueError as error:
        wrong.append(f"{name}: {error}")
        return None


def _split(options: Compare, text: str) -> SplitSpec:
    words = shlex.split(text)
    given = flags_of(words)
    device = [] if "device" in given else ["--device", options.device]
    typed = checked("qsvd quantize", Quantize, [options.model, "--out", "OUT", *device, *words], {})
    made: Quantize = read_words(Quantize, typed, {}, "qsvd quantize")
    _refuse(made, ("out", "push_to_hub", "public", "dry_run"), "which qsvd compare sets", known={"out": Path("OUT")})
    check(replace(made, model=options.model, out=options.out / "splits" / "new"))
    return SplitSpec(text, made, has_rank=any(f"{name}" in given for name in RANKS))


def _method(options: Compare, text: str) -> MethodSpec:
    words = shlex.split(text)
    name = words[0] if words else ""
    if name not in METHODS:
        raise BadInput(f"{name!r} is no method{meant(name, METHODS)}; qsvd methods lists them")
    record = with_options(Train, name)
    shared = {one: getattr(options, one) for one in SHARED}
    typed = checked("qsvd train", record, ["MODEL", "DATA", "--out", "RUN", "--method", name, *words[1:]], {})
    made: Train = read_words(record, typed, {}, "qsvd train")
    hidden = [one.name for one in fields(Train) if SAME_RESULT in marks_of(Train)[one.name]]
    places = {"base": "MODEL", "data": "DATA", "out": Path("RUN"), "method": name}
    _refuse(made, ("method", *hidden, *FIXED), "which all rows have in common", known=places)
    defaults = {one.name: one.default for one in fields(Train)}
    own = {one: value for one, value in shared.items() if getattr(made, one) == defaults[one]}
    made = replace(made, **own)
    check(replace(made, base=options.model, data=options.data, out=options.out / "runs" / "new"))
    return MethodSpec(text, made)


def _refuse(made: Any, names: Iterable[str], why: str, *, known: dict[str, Any]) -> None:
    """Refuse options in a spec that are not its own."""
    usual = {one.name: one.default for one in fields(made)} | known
    given = [f"--{name.replace('_', '-')}" for name in dict.fromkeys(names) if getattr(made, name) != usual[name]]
    if given:
        raise BadInput(f"leave out {', '.join(given)}, {why}")


def changed(made: Any, left_out: Sequence[str] = ()) -> dict[str, Any]:
    """Return the options that are not at their defaults, as values of JSON: what a cell is known by.

    A file stands for what it holds.
    """
    usual = {one.name: one.default for one in fields(made) if one.name not in left_out}
    return {name: _plain(name, value) for name in usual if (value := getattr(made, name)) != usual[name]}


def _plain(name: str, value: Any) -> Any:
    may_be_file = isinstance(value, Path) or name in ("calibrate", "chat_template")
    if may_be_file and Path(value).expanduser().is_file():
        return file_sha256(Path(value).expanduser())
    return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
