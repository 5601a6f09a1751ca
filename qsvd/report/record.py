"""A WeightError as a JSON object, one per line of errors.jsonl, and back without loss."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from typing import Any, cast, get_type_hints

from qsvd.decompose.measure import WeightError
from qsvd.numerics.error import Norms


def to_record(error: WeightError) -> dict[str, Any]:
    """The error as dicts, lists, strings and numbers; json writes its floats so that they come back equal."""
    return asdict(error) | {"shape": list(error.shape)}


def from_record(record: object) -> WeightError:
    """The error that to_record turned into `record`.

    Raises:
        ValueError: record is no object, lacks a field, has one more, or holds something else than the field takes;
            all such faults are named.
    """
    faults = _faults(record, WeightError, "")
    if faults:
        raise ValueError(f"not a record of a weight's error: {'; '.join(faults)}")
    values = dict(cast(Mapping[str, Any], record))
    values["shape"] = tuple(values["shape"])
    for side in ("before", "after"):
        values[side] = _floats(Norms, values[side])
    return _floats(WeightError, values)


def _floats(kind: type, values: Mapping[str, Any]) -> Any:
    """A `kind` of these values, a whole number where it takes a float (JSON writers differ) made one."""
    hints = get_type_hints(kind)
    return kind(**{name: float(value) if hints[name] is float else value for name, value in values.items()})


def _faults(value: object, kind: type, path: str) -> list[str]:
    """Sentences on what keeps `value`, found at `path`, from being a `kind`."""
    if not isinstance(value, Mapping):
        return [f"{path.rstrip('.') or 'the record'} is {value!r}, not an object"]
    names = [field.name for field in fields(kind)]
    missing = [f"{path}{name} is missing" for name in names if name not in value]
    unknown = [f"{path}{name} is unknown" for name in value if name not in names]
    hints = get_type_hints(kind)
    wrong: list[str] = []
    for name in (name for name in names if name in value):
        if hints[name] is Norms:
            wrong += _faults(value[name], Norms, f"{path}{name}.")
        elif not _CHECKS[hints[name]][0](value[name]):
            wrong.append(f"{path}{name} is {value[name]!r}, not {_CHECKS[hints[name]][1]}")
    return missing + unknown + wrong


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_measure(value: object) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value) and value >= 0)


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_is_whole(size) and size > 0 for size in value)


_CHECKS: dict[Any, tuple[Callable[[object], bool], str]] = {
    str: (lambda value: isinstance(value, str), "a string"),
    int: (_is_whole, "a whole number of 0 or more"),
    float: (_is_measure, "a finite number of 0 or more"),
    tuple[int, int]: (_is_shape, "a list of two positive whole numbers"),
}
