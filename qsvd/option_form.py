"""A command line as a record of options: tyro's form of a record, and words read by it."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import MISSING, fields, is_dataclass, make_dataclass
from dataclasses import field as new_field
from inspect import getdoc
from typing import Annotated, Any, get_args, get_type_hints

from qsvd.arguments import flags_of
from qsvd.option_types import APPEND, POSITIONAL, Group, Help, marks_of


def read_words(record: type, words: Sequence[str], defaults: Mapping[str, Any], prog: str) -> Any:
    """Return the record of words that `qsvd.arguments.checked` has checked. Help raises SystemExit(0).

    Args:
        defaults: Values from a file of options.
        prog: For the help, "qsvd train".
    """
    import tyro

    flags = {flag.replace("-", "_") for flag in flags_of(words)}
    given = None if {"-h", "--help"} & {*words} else flags | {flag.removeprefix("no_") for flag in flags}
    found = tyro.cli(
        _form(record, defaults, given),
        args=list(words),
        prog=prog,
        description=getdoc(record),
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.HelptextFromCommentsOff),
    )
    groups = [value for value in vars(found).values() if is_dataclass(value)]
    values = {name: value for part in (found, *groups) for name, value in vars(part).items() if value not in groups}
    return record(**{**defaults, **values})


def _form(record: type, defaults: Mapping[str, Any], given: Set[str] | None) -> type:
    """Return a dataclass for tyro with the options of a record; its nested dataclasses are the groups of the help.

    Args:
        given: The flags that are needed, since tyro takes a millisecond for each; None for all, as in the help.
    """
    from tyro.conf import Positional, UseAppendAction, arg

    groups: dict[str, list[tuple[str, Any, Any]]] = {"": []}
    hints, marks, title = get_type_hints(record), marks_of(record), ""
    for option in fields(record):
        title = next((mark.title for mark in marks[option.name] if isinstance(mark, Group)), title)
        if given is not None and option.name not in given and POSITIONAL not in marks[option.name]:
            continue
        help_ = [mark for mark in marks[option.name] if isinstance(mark, Help)][-1]
        kind, default = hints[option.name], defaults.get(option.name, option.default)
        hint = "" if default in (None, (), MISSING) else None  # instead of (default: None); None is tyro's own hint
        metavar = help_.metavar
        if default is None and metavar is None:
            metavar = get_args(kind)[0].__name__.upper()  # instead of {None}|INT
        shown = arg(help=help_.text, metavar=metavar, help_behavior_hint=hint, aliases=help_.aliases, prefix_name=False)
        typed = Positional[kind] if POSITIONAL in marks[option.name] else kind
        typed = Annotated[UseAppendAction[kind] if APPEND in marks[option.name] else typed, shown]
        groups.setdefault(title, []).append((option.name, typed, new_field(default=default, kw_only=True)))
    top = groups.pop("")
    for number, (title, options) in enumerate(groups.items()):
        group = make_dataclass(f"Group{number}", options, namespace={"__doc__": ""})
        top.append((f"group{number}", Annotated[group, arg(name=title)], new_field(default_factory=group)))
    return make_dataclass(record.__name__, top)
