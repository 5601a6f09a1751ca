"""From what people type to what the options are called: other tools' names, and near misses.

tyro converts the values afterwards. The checks here say in one sentence what is wrong, before anything heavy is
imported.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from shlex import join
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from qsvd.errors import BINARY, UNITS, BadInput
from qsvd.inputs.other_names import NAMES, PLACES, REMEDIES, SHORT, VALUES, WRONG_VALUES
from qsvd.option_types import APPEND, POSITIONAL, Help, marks_of

PAGES = (".html", ".htm")
YES, NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


@dataclass(frozen=True)
class _Option:
    name: str
    kind: Any
    help: Help
    is_positional: bool
    default: Any

    @property
    def typed(self) -> str:
        """The name as it is typed, without the leading --."""
        return self.name.replace("_", "-")

    @property
    def shown(self) -> str:
        """The option with its value, as the help shows it."""
        choices = "|".join(map(str, get_args(self.kind))) if get_origin(self.kind) is Literal else ""
        value = self.help.metavar or choices or getattr(self.kind, "__name__", "VALUE").upper()
        return value if self.is_positional else f"--{self.typed} {value}"


def checked(command: str, record: type, arguments: Sequence[str], defaults: Mapping[str, Any]) -> list[str]:
    """Return the arguments with our names, after a check of each; those without a flag are first.

    Args:
        command: For the sentence, "qsvd train".
        defaults: Values from a file of options.

    Raises:
        BadInput: an option does not exist, lacks its value or has a wrong one, or is required and missing.
    """
    options = {option.typed: option for option in options_of(record)}
    given, result, wrong, extra = {*defaults}, list[str](), list[str](), list[str]()
    placed: dict[str, _Option] = {}
    switch, after = None, dict[str, _Option]()  # a switch without a value, and words that follow one
    for name, values in _grouped(arguments, options):
        option = options.get(name, options.get(name.removeprefix("no-")))
        if not name:
            extra += values
            after |= {values[0]: switch} if switch else {}
        elif place := _place(name, options):
            placed[f"{'-' if len(name) == 1 else '--'}{name}"] = place
        elif option is None:
            wrong.append(_no_option(command, name, options))
        else:
            given.add(option.name)
            words, faults = _checked_values(option, name, values)
            result, wrong = result + words, wrong + faults
        switch = option if option and not values and _is_switch(option.kind) else None
    if placed:
        takes = " and ".join(place.shown for place in placed.values())
        wrong.append(f"{command} takes {takes} without {' and '.join(placed)}: {_usage(command, options)}")
    places = [option for option in options.values() if option.is_positional]
    wrong += _without_a_place(command, extra, options, given, after)
    words_of = _words_of(places, extra, defaults)
    given |= {*words_of}
    missing = [option for option in options.values() if option.default is MISSING and option.name not in given]
    if missing and not wrong:
        wrong.append(f"{command} needs {', '.join(_described(option) for option in missing)}")
    if wrong:
        raise BadInput(f"{'; '.join(wrong)}; see {command} --help")
    return [*(word for words in words_of.values() for word in words), *result]


def _words_of(places: Sequence[_Option], words: Sequence[str], defaults: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the words of each option without a flag, up to the last one that is typed.

    Words are for the options that the file of options lacks; if there are more words, they replace its values too.
    """
    lacking = [option for option in places if option.name not in defaults]
    open_places = iter(lacking if len(words) <= len(lacking) else places)
    typed, rest = dict[str, list[str]](), list(words)
    while rest and (option := next(open_places, None)):
        count = len(rest) if get_origin(option.kind) is tuple else 1
        typed[option.name] = rest[:count]
        del rest[:count]
    last = max((number for number, option in enumerate(places) if option.name in typed), default=-1)
    of_file = {name: [str(value)] for name, value in defaults.items()}
    return {option.name: typed.get(option.name) or of_file[option.name] for option in places[: last + 1]}


def _described(option: _Option) -> str:
    """Return an option with the first sentence of its help."""
    first = option.help.text.partition(". ")[0].rstrip(".")
    is_word = first[1:2].islower() or first[1:2] == " "  # not JSON
    return f"{option.shown} ({first[0].lower() if is_word else first[0]}{first[1:]})"


def _place(name: str, options: Mapping[str, _Option]) -> _Option | None:
    """Return the option without a flag that another tool has with this one."""
    ours = PLACES.get(name, (name.replace("-", "_"),))
    return next((option for option in options.values() if option.is_positional and option.name in ours), None)


def _no_option(command: str, name: str, options: Mapping[str, _Option]) -> str:
    """Return that there is no such option, and what to do instead."""
    flag = f"-{name}" if len(name) == 1 else f"--{name}"
    if name in REMEDIES:
        return f"{command} has no option {flag} ({REMEDIES[name]})"
    if "data" in options and "data" in PLACES.get(name, ()):
        return f"{command} has no option {flag} (did you mean --data?)"
    known = ["--help", "--config", *(f"--{one}" for one, option in options.items() if not option.is_positional)]
    return f"{command} has no option {flag}{meant(flag, known)}"


def _without_a_place(
    command: str,
    extra: Sequence[str],
    options: Mapping[str, _Option],
    given: Collection[str],
    after: Mapping[str, _Option],
) -> list[str]:
    """Return what is wrong with the words that belong to no option, and what each may belong to.

    Args:
        after: Words that follow a switch, which may be meant as its value.
    """
    units = [word.upper() for word in extra if word.upper() in (*UNITS, *BINARY)]
    if units:
        return [f"write a size as one word, such as 24{unit}" for unit in units]
    places = [option for option in options.values() if option.is_positional]
    if len(extra) <= len(places) or any(get_origin(option.kind) is tuple for option in places):
        return []
    word, takes = extra[len(places)], " ".join(option.shown for option in places) or "options only"
    for value, switch in after.items():
        if value == word or switch.kind is not bool:
            choices = get_args(switch.kind) or ("yes", "no")
            return [f"--{switch.typed} {value!r} is not one of {', '.join(choices)}{meant(value, choices)}"]
    free = next((name for name in ("out", "prompt") if name in options and name not in given), None)
    asked = f" (did you mean {join([f'--{free}', word])}?)" if free else ""
    return [f"{command} takes {takes}, and {word!r} is one argument too many{asked}"]


def _usage(command: str, options: Mapping[str, _Option]) -> str:
    """Return a command line with all that is required, "qsvd train MODEL DATA --out RUN"."""
    required = [option for option in options.values() if option.default is MISSING or option.is_positional]
    return " ".join([command, *(option.shown for option in sorted(required, key=lambda one: not one.is_positional))])


def meant(name: str, known: Iterable[str]) -> str:
    """Return the nearest name in words, or nothing if none is near."""
    near = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]}?)" if near else ""


def options_of(record: type) -> Iterator[_Option]:
    hints, marks = get_type_hints(record), marks_of(record)
    for field in fields(record):
        text = [mark for mark in marks[field.name] if isinstance(mark, Help)][-1]
        kind = get_args(hints[field.name])[0] if APPEND in marks[field.name] else hints[field.name]
        yield _Option(field.name, kind, text, POSITIONAL in marks[field.name], field.default)


def canonical(name: str, known: Iterable[str]) -> str:
    """Return our name of an option, if it is another tool's and the command has ours."""
    names = {one.replace("_", "-") for one in known}
    ours = "limit" if name == "samples" and "limit" in names else NAMES.get(name, name)
    return ours if name not in names and ours in names else name


def _grouped(arguments: Sequence[str], options: Mapping[str, _Option]) -> Iterator[tuple[str, list[str]]]:
    """Yield the name of each option with its values, and each value without an option with an empty name."""
    aliases = {alias[2:]: option.typed for option in options.values() for alias in option.help.aliases or ()}
    rest = list(arguments)
    while rest:
        word = SHORT.get(rest[0], rest[0])
        del rest[0]
        if _is_short(word):
            yield word[1:], rest[: _count(None, rest)]
            del rest[: _count(None, rest)]
            continue
        if not _is_flag(word):
            yield "", [word]
            continue
        written, joined, value = word[2:].partition("=")
        name = canonical(written.replace("_", "-"), options)
        name = aliases.get(name, name)
        if name == "bf16" and "dtype" in options:
            del rest[: bool(rest) and rest[0].lower() in YES]
            name, joined, value = "dtype", "=", "bfloat16"
        if joined:
            yield name, [value]
            continue
        count = _count(options.get(name, options.get(name.removeprefix("no-"))), rest)
        yield name, rest[:count]
        del rest[:count]


def flags_of(arguments: Sequence[str]) -> dict[str, str]:
    """Return the flags of a command line by name, each with the word after it, or an empty text."""
    found = dict[str, str]()
    for number, word in enumerate(arguments):
        if word.startswith("--"):
            name, joined, value = word[2:].partition("=")
            after = arguments[number + 1] if number + 1 < len(arguments) else ""
            found[name] = value if joined else after if not after.startswith("--") else ""
    return found


def _is_switch(kind: Any) -> bool:
    """Return whether an option may be given without a value, for yes, and with no- before its name."""
    return kind is bool or {"yes", "no"} <= {*get_args(kind)}


def _is_short(word: str) -> bool:
    """Return whether a word is an option of one letter, which another tool may have."""
    return len(word) == 2 and word[0] == "-" and word[1].isalpha()


def _is_flag(word: str) -> bool:
    """Return whether a word is an option; several options in one word, "--rank 8 --order svd", are a value."""
    return word.startswith("--") and " " not in word.partition("=")[0]


def _count(option: _Option | None, rest: Sequence[str]) -> int:
    """Return how many of the next words are values of an option."""
    free = next((number for number, word in enumerate(rest) if _is_flag(word) or word in SHORT), len(rest))
    if option is not None and get_origin(option.kind) is tuple:
        return free
    if option is not None and option.help.bare is not None:
        return int(free > 0 and rest[0].lower().endswith(PAGES))
    if option is not None and _is_switch(option.kind):
        return int(free > 0 and rest[0].lower() in (*YES, *NO, *get_args(option.kind), *VALUES.get(option.name, ())))
    return min(free, 1)


def _checked_values(option: _Option, name: str, values: list[str]) -> tuple[list[str], list[str]]:
    """Return the words for tyro, and what is wrong with them."""
    word = values[0].lower() if values else "yes"
    word = VALUES.get(option.name, {}).get(word, word)
    if option.kind is bool or (_is_switch(option.kind) and word in (*YES, *NO)):
        is_off = (name != option.typed) != (word in NO)
        if option.kind is not bool:
            return [f"--{option.typed}", "no" if is_off else "yes"], []
        return [f"--{'no-' if is_off else ''}{option.typed}"], []
    if name != option.typed and _is_switch(option.kind):
        return [], [f"--{name} takes no value, and {word!r} is one: leave it out, or give --{option.typed} {word}"]
    if not values and option.help.bare is not None:
        values = [option.help.bare]
    if not values and get_origin(option.kind) is not tuple:
        return [], [f"--{name} needs a value: {_described(option)}"]
    values = [VALUES.get(option.name, {}).get(value, value) for value in values]
    hints = WRONG_VALUES.get(option.name, {})
    wrong = [
        f"--{name} {value!r} {_fault(option.kind, value, hints.get(value))}"
        for value in values
        if _fault(option.kind, value)
    ]
    if get_origin(option.kind) is tuple:  # tyro would take "--rank 8 --order svd" for an option
        values = [f" {value}" if value.startswith("--") else value for value in values]
    return [f"--{name}", *values], wrong


def _fault(kind: Any, text: str, hint: str | None = None) -> str:
    """Return what is wrong with the text of a value, or nothing.

    Args:
        hint: What to do about this value; None names the nearest choice.
    """
    if get_origin(kind) in (Union, UnionType):
        faults = [_fault(one, text) for one in get_args(kind) if one is not type(None)]
        return "" if "" in faults else " and ".join(faults)
    if get_origin(kind) is tuple:
        return _fault(get_args(kind)[0], text)
    if get_origin(kind) is Literal:
        choices = [str(choice) for choice in get_args(kind)]
        nearest = meant(text, choices) if hint is None else f": {hint}"
        return "" if text in choices else f"is not one of {', '.join(choices)}{nearest}"
    if kind in (int, float):
        with suppress(ValueError):
            kind(text)
            return ""
        return "is not a whole number" if kind is int else "is not a number"
    return ""
