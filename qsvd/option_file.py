"""Options from a YAML file, or from the keywords of a call in Python: their names, and each value as its type."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from qsvd.arguments import canonical, meant, options_of
from qsvd.errors import BadInput
from qsvd.inputs.other_names import PLACES, REMEDIES, VALUES


def take_config(arguments: list[str]) -> tuple[list[str], Path | None]:
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


def from_names(record: type, given: Mapping[Any, Any], source: str) -> dict[str, Any]:
    """Return values by the names of a record's options, each of the type of its option.

    Args:
        given: Values by our names or other tools'; a path is a text, and several values are a list.
        source: Where they are from, for the sentence.

    Raises:
        BadInput: a name is not an option, two names are one option, or a value is of another type.
    """
    types = get_type_hints(record)
    shown = {option.shown.lower(): option.name for option in options_of(record) if option.is_positional}  # MODEL: base
    values, wrong = dict[str, Any](), list[str]()
    for written, value in given.items():
        name = canonical(str(written).replace("_", "-"), types).replace("-", "_")
        if name == "bf16" and value is True and "dtype" in types:
            name, value = "dtype", "bfloat16"
        name = name if name in types else shown.get(name, name)
        if values.get(name):
            wrong.append(f"{name!r} is given twice, once as {str(written)!r}: leave one of them out")
        elif name not in types:
            wrong.append(_unknown_name(name, types | shown))
        else:
            values[name] = VALUES.get(name, {}).get(value, value) if isinstance(value, str) else value
    found = {}
    for name in [name for name in types if name in values]:
        try:
            found[name] = _as(types[name], values[name])
        except TypeError as error:
            wrong.append(f"{name} {error}")
    if wrong:
        raise BadInput(f"{source}: {'; '.join(wrong)}")
    return found


def _unknown_name(name: str, types: Collection[str]) -> str:
    """Return that a name is not an option, with the nearest one or else all."""
    typed = name.replace("_", "-")
    near = next((f" (did you mean {ours}?)" for ours in PLACES.get(typed, ()) if ours in types), meant(name, types))
    if typed in REMEDIES:
        near = f": {REMEDIES[typed]}"
    everything = f" (known: {', '.join(types)})"
    return f"unknown option {name!r}{near or everything}"


MOST_BYTES = 10**6  # of a YAML text
MOST_VALUES = 10**5  # in it, where an alias counts what it stands for
MOST_DEPTH = 20


def read_yaml(text: str) -> Any:
    """Return the value of a YAML text: null, numbers, texts, lists and mappings.

    Raises:
        yaml.YAMLError: it is not valid YAML; it has a tag, a key twice, or an alias within what it stands for; or it
            is above MOST_BYTES, MOST_VALUES or MOST_DEPTH.
    """
    import yaml

    if len(text) > MOST_BYTES:
        raise yaml.YAMLError(f"it has more than {MOST_BYTES:,} bytes")
    loader, depth = getattr(yaml, "CSafeLoader", yaml.SafeLoader), 0  # the first is libyaml's, and fast
    for event in yaml.parse(text, loader):
        starts, ends = isinstance(event, yaml.CollectionStartEvent), isinstance(event, yaml.CollectionEndEvent)
        depth += starts - ends
        if depth > MOST_DEPTH:
            raise yaml.YAMLError(f"{event.start_mark}: more than {MOST_DEPTH} values within each other")
        if getattr(event, "tag", None) is not None:
            raise yaml.YAMLError(f"{event.start_mark}: the tag {event.tag} is not read")
    root = yaml.compose(text, loader)
    if root is not None:
        _count(root, {})
    return yaml.load(text, loader)  # both are safe loaders


def _count(node: Any, sizes: dict[int, int]) -> int:
    """Return the number of values in a YAML node; refuse too many, and a key that is there twice."""
    import yaml

    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in sizes:
        sizes[id(node)] = MOST_VALUES  # for an alias within what it stands for
        parts = node.value
        if isinstance(node, yaml.MappingNode):
            keys = Counter(key.value for key, _ in parts if isinstance(key, yaml.ScalarNode))
            if keys and (twice := keys.most_common(1)[0])[1] > 1:
                raise yaml.YAMLError(f"{node.start_mark}: {twice[0]} is there twice")
            parts = [part for pair in parts for part in pair]
        sizes[id(node)] = 1 + sum(_count(part, sizes) for part in parts)
    if sizes[id(node)] > MOST_VALUES:
        raise yaml.YAMLError(f"{node.start_mark}: more than {MOST_VALUES:,} values, or an alias without an end")
    return sizes[id(node)]


def yaml_mapping(file: Path) -> Mapping[Any, Any]:
    """Return the names and values of a YAML file."""
    import yaml

    try:
        with file.open(encoding="utf-8") as opened:
            values = read_yaml(opened.read(MOST_BYTES + 1))
    except FileNotFoundError as error:
        raise BadInput(f"--config {file}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--config {file} cannot be read as a text file: {error}") from error
    except (yaml.YAMLError, ValueError) as error:  # the second: a date such as 2020-99-99
        raise BadInput(f"--config {file} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, Mapping):
        raise BadInput(f"--config {file} must hold `name: value` lines")
    return values


def _as(kind: Any, value: Any) -> Any:
    """A value as an option's type; TypeError says what is allowed."""
    if get_origin(kind) in (Union, UnionType):
        kinds = [one for one in get_args(kind) if one is not type(None)]
        return None if value is None and len(kinds) < len(get_args(kind)) else _as_one_of(kinds, value)
    if get_origin(kind) is Literal:
        if isinstance(value, bool) and "yes" in get_args(kind):  # YAML 1.1 takes yes and no for these
            return "yes" if value else "no"
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


def _as_one_of(kinds: Sequence[Any], value: Any) -> Any:
    faults = []
    for kind in kinds:
        try:
            return _as(kind, value)
        except TypeError as error:
            faults.append(str(error))
    raise TypeError(" and ".join(faults))


def _as_float(value: Any) -> float:
    """A number; YAML 1.1 takes 2 for an integer and 2e-5, without a dot, for a text."""
    if type(value) in (int, float, str):
        with suppress(ValueError):
            return float(value)
    raise TypeError(f"is {value!r}, not of type float")
