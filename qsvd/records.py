"""Records without torch: norms, the error of one weight, how much of a model is split, how far a run is.

`stored` makes a record of what a JSON file holds, and checks it. This file imports no torch, so that `qsvd report`
starts at once.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from qsvd.errors import BadInput, listing

MOST_FAULTS = 10  # in a sentence
Kind = TypeVar("Kind")

Role = Literal[
    "q", "k", "v", "o", "gate", "up", "down", "expert up", "expert down", "other", "embedding", "head"
]  # what a layer does in its block, or next to the blocks


@dataclass(frozen=True)
class Norms:
    """Norms of one error matrix, in the units of the weight.

    nuclear_error is the standard error of an estimated nuclear norm, and 0 if the norm is exact.
    """

    frobenius: float
    nuclear: float
    nuclear_error: float
    spectral: float


@dataclass(frozen=True)
class WeightedError:
    """Relative errors of one weight in the norm of second moments, sqrt(tr(G E H E^T) / tr(G W H W^T)).

    kept_nearest says that error feedback was not better than nearest codes, which were kept.
    """

    before: float
    after: float
    kept_nearest: bool


@dataclass(frozen=True)
class WeightError:
    """The error of one weight W [out, in]: `before` of codec(W) alone, `after` of the stored split.

    bits counts everything that is stored for the split, factors included, per element of W.
    weight_frobenius is ||W||_F; a Frobenius error over it is the relative error. weighted is there if second moments
    weighted the split.
    """

    name: str
    role: str
    shape: tuple[int, int]
    rank: int
    bits: float
    iteration: int
    weight_frobenius: float
    before: Norms
    after: Norms
    weighted: WeightedError | None = None


@dataclass(frozen=True)
class LeftTensors:
    """Tensors that are not split and differ only in their numbers, "model.layers.*.input_layernorm.weight".

    reason is why a linear layer of the blocks is not split, "" for all other tensors.
    """

    pattern: str
    count: int
    elements: int
    reason: str = ""

    @property
    def size(self) -> str:
        """Number of tensors and elements, and the reason, in words."""
        words = f"{self.count:,} {'tensor' if self.count == 1 else 'tensors'}, {self.elements:,} elements"
        return f"{words}: {self.reason}" if self.reason else words


@dataclass(frozen=True)
class Coverage:
    """How much of a model is split. Tied tensors count once; persistent buffers count."""

    weights: int
    elements_split: int
    elements: int
    left: tuple[LeftTensors, ...]  # largest first
    unknown: tuple[LeftTensors, ...] = ()  # of the checkpoint, not of the model: copied, and not in `elements`

    @property
    def share(self) -> float:
        """Split elements over all elements, 0 to 1."""
        return self.elements_split / self.elements


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Args:
        loss: Nats per trained token, or per example for a classifier.
        tokens, seconds: From the start of the run, interrupted parts included.
        peak_bytes: Of the GPU; on a CPU, of the process.
        held_out: Loss on the held-out examples after the step, in the same unit; None where it was not measured.
    """

    number: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    seconds: float
    peak_bytes: int
    held_out: float | None = None


@dataclass(frozen=True)
class Start:
    """What start.json holds: loss and accuracy on the held-out examples before the first step; None without them."""

    held_out_before: float | None = None
    accuracy_before: float | None = None


@dataclass(frozen=True)
class Written:
    """What a model writes after a prompt, before and after it was trained.

    Args:
        prompt: The end of it, as the model reads it.
        expected: What the data have in this place.
        after: None until the run is complete.
    """

    prompt: str
    expected: str
    before: str
    after: str | None = None


@dataclass(frozen=True)
class Texts:
    """What texts.json holds: examples of a few prompts, each with at most so many new tokens."""

    new_tokens: int
    examples: tuple[Written, ...]


FAST = 10  # units a second, from which a speed is shown as a whole number


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Args:
        done: Finished work, in any unit.
        new: The part of it that this run did; the rest was done before the run was resumed.
        total: All work.
        what: Finished work in words, "3/12 weights".
        rate: Unit of the speed that is shown and its size in units of work, ("MB/s", 1e6); None shows no speed.
        more: What is shown after the time left.
        may_stop: Whether a stop at this point loses nothing.
        seconds: Time of the new work; None is that since the first progress that was shown.
    """

    done: float
    new: float
    total: float
    what: str
    rate: tuple[str, float] | None = None
    more: str = ""
    may_stop: bool = True
    seconds: float | None = None

    @property
    def share(self) -> float:
        """Return the finished share of the work, 0 to 1."""
        return self.done / self.total

    def line(self, seconds: float | None) -> str:
        """Return the progress as one line.

        Args:
            seconds: Time of the new work; None if it cannot tell the speed yet.
        """
        seconds = seconds if self.seconds is None else self.seconds
        if seconds is None or self.done == 0:
            return ", ".join(filter(None, [self.what, self.more]))
        speed = self.new / max(seconds, 1e-9)
        parts = [self.what]
        if self.rate is not None:
            unit, size = self.rate
            parts.append(f"{speed / size:,.{int(0 < speed / size < FAST)}f} {unit}")
        parts.append(f"{(self.total - self.done) / speed:.0f} s left" if speed else "resumed")
        return ", ".join([*parts, *filter(None, [self.more])])


ShowProgress = Callable[[Progress], None]


def show_nothing(progress: Progress) -> None:
    """Show nothing: for callers from Python."""
    del progress


def stored(kind: type[Kind], value: object, what: str) -> Kind:
    """Return the `kind` that `asdict` and json turned into `value`.

    Numbers are finite and at least 0, but for a field named "seed"; whole numbers may be floats where floats are due.

    Args:
        kind: A frozen dataclass whose fields are numbers, strings, booleans, tuples, mappings from strings, such
            dataclasses, Literals of these, or None.
        what: What the sentence of an error begins with.

    Raises:
        BadInput: value is not an object, lacks a field, has an unknown one, or a value of a wrong kind; the sentence
            lists these.
    """
    if faults := list(_faults(kind, value, "")):
        raise BadInput(f"{what}: {listing(faults, MOST_FAULTS, '; ')}")
    return _made(kind, value)


def _is_whole(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_measure(value: object) -> bool:
    return _is_whole(value) or (isinstance(value, float) and 0 <= value < math.inf)


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_is_whole(size) and size > 0 for size in value)


CHECKS: dict[Any, tuple[Callable[[object], bool], str]] = {
    Any: (lambda _: True, ""),
    str: (lambda value: isinstance(value, str), "a string"),
    bool: (lambda value: isinstance(value, bool), "true or false"),
    NoneType: (lambda value: value is None, "null"),
    int: (_is_whole, "a whole number of 0 or more"),
    float: (_is_measure, "a finite number of 0 or more"),
    tuple[int, int]: (_is_shape, "a list of two positive whole numbers"),
}


@cache
def _hints_of(record: type) -> Mapping[str, Any]:
    return get_type_hints(record)


def _faults(kind: Any, value: Any, path: str) -> Iterator[str]:
    """Yield a sentence for everything that keeps `value`, found at `path`, from being a `kind`."""
    if kind in CHECKS:
        check, words = CHECKS[kind]
        if not check(value) and not (path.endswith("seed") and type(value) is int):
            yield f"{path or 'the record'} is {value!r}, not {words}"
    elif is_dataclass(kind):
        yield from _of_fields(kind, value, path)
    else:
        yield from OF_ORIGINS[get_origin(kind)](get_args(kind), value, path)


def _of_fields(kind: Any, value: Any, path: str) -> Iterator[str]:
    if not isinstance(value, Mapping):
        yield f"{path or 'the record'} is {value!r}, not an object"
        return
    hints, prefix = _hints_of(kind), f"{path}." if path else ""
    needed = [field.name for field in fields(kind) if field.default is MISSING and field.default_factory is MISSING]
    yield from (f"{prefix}{name} is missing" for name in needed if name not in value)
    yield from (f"{prefix}{name} is unknown" for name in value if name not in hints)
    for name in (name for name in hints if name in value):
        yield from _faults(hints[name], value[name], f"{prefix}{name}")


def _of_union(kinds: Sequence[Any], value: Any, path: str) -> Iterator[str]:
    """Yield the faults for the first kind, if value is of none of them."""
    found = [list(_faults(kind, value, path)) for kind in kinds]
    if [] not in found:
        yield from found[0]


def _of_choice(choices: Sequence[Any], value: Any, path: str) -> Iterator[str]:
    if value not in choices:
        yield f"{path} is {value!r}, not one of {', '.join(map(str, choices))}"


def _of_items(kinds: Sequence[Any], value: Any, path: str) -> Iterator[str]:
    if not isinstance(value, list | tuple):
        yield f"{path} is {value!r}, not a list"
        return
    for number, item in enumerate(value):
        yield from _faults(kinds[0], item, f"{path}[{number}]")


def _of_mapping(kinds: Sequence[Any], value: Any, path: str) -> Iterator[str]:
    if not isinstance(value, Mapping):
        yield f"{path} is {value!r}, not an object"
        return
    for key, item in value.items():
        yield from _faults(kinds[1], item, f"{path}.{key}")


OF_ORIGINS: dict[Any, Callable[[Sequence[Any], Any, str], Iterator[str]]] = {
    Union: _of_union,
    UnionType: _of_union,
    Literal: _of_choice,
    tuple: _of_items,
    Mapping: _of_mapping,
}


def _made(kind: Any, value: Any) -> Any:
    """Return a value without faults as a `kind`."""
    if is_dataclass(kind):
        hints = _hints_of(kind)
        make: Any = kind
        return make(**{name: _made(hints[name], item) for name, item in value.items()})
    if get_origin(kind) in (Union, UnionType):
        kinds = [one for one in get_args(kind) if not any(_faults(one, value, ""))]
        return _made(kinds[0], value)
    if get_origin(kind) is tuple:
        return tuple(_made(get_args(kind)[0], item) for item in value)
    if get_origin(kind) is Mapping:
        return {name: _made(get_args(kind)[1], item) for name, item in value.items()}
    if kind is float:
        return float(value)  # some JSON writers turn 4.0 into 4
    return value
