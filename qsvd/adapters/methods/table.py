"""The methods by name, and which of them a layer has."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field as new_field
from dataclasses import fields, make_dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

from qsvd.adapters.adapter import Adapter, AdapterOptions
from qsvd.adapters.methods.frozen import Frozen
from qsvd.errors import BadInput, listing
from qsvd.option_types import ADDED, Group, Method, out_of_range
from qsvd.plan.allocation import EXPERT_RANK
from qsvd.plan.targets import is_expert, is_target

METHODS: dict[str, type[Adapter]] = {  # the file NAME.py, "-" as "_"
    name: import_module(f"qsvd.adapters.methods.{name.replace('-', '_')}").METHOD
    for name in get_args(Method)
    if name != "auto"
}


def default_method(ranks: Iterable[int]) -> str:
    """Return the method for a model with these stored ranks: pissa, or lora if a weight has no components."""
    return "pissa" if all(ranks) else "lora"


def check_own_options(method: str, options: AdapterOptions) -> None:
    """Raise BadInput if an option belongs to another method, or its value is out of range."""
    given = [name for name in ("dropout", "rslora") if getattr(options, name)] + [*options.own]
    names = _names_of(METHODS[method])
    for name in given:
        if name not in names:
            owners = [owner for owner, kind in METHODS.items() if name in _names_of(kind)]
            if not owners:
                raise BadInput(f"the method {method} has no option {name!r}; it has {listing(names) or 'none'}")
            raise BadInput(
                f"{name} is an option of the method {' or '.join(owners)}, and the method is {method}: choose "
                f"{owners[0]} (--method {owners[0]}), or leave {name} out"
            )
    if not 0 <= options.dropout < 1:
        raise BadInput(f"dropout {options.dropout:g} is not a number from 0 to below 1")
    wrong = out_of_range(METHODS[method].own(options))
    if wrong:
        raise BadInput("; ".join(wrong))


def _names_of(kind: type[Adapter]) -> tuple[str, ...]:
    """Return the options that a method has and others lack."""
    return (*kind.shared_options, *(field.name for field in fields(kind.options)))


def with_options(record: type, method: str) -> type:
    """Return a record of options, Train or Plan, with the options of a method's own at its end."""
    own = METHODS[method].options
    hints, marks = get_type_hints(own, include_extras=True), [Group(f"method-{method}"), ADDED]
    options = [
        (
            option.name,
            Annotated[hints[option.name], *marks[number > 0 :]],
            new_field(default=option.default, kw_only=True),
        )
        for number, option in enumerate(fields(own))
    ]
    return make_dataclass(record.__name__, options, bases=(record,), frozen=True, namespace={"__doc__": record.__doc__})


def own_options(options: object, method: str) -> dict[str, Any]:
    """Return the options of a method's own that a record has and that differ from their defaults, by name."""
    defaults = {field.name: field.default for field in fields(METHODS[method].options)}
    found = {name: getattr(options, name, default) for name, default in defaults.items()}
    return as_recorded({name: value for name, value in found.items() if value != defaults[name]})


def as_recorded(own: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of a method's own as its record has them: an absolute path instead of a path."""
    return {
        name: str(value.expanduser().absolute()) if isinstance(value, Path) else value for name, value in own.items()
    }


def owners(name: str) -> list[str]:
    """Return the methods that have an option of their own with this name."""
    return [method for method, kind in METHODS.items() if name in {field.name for field in fields(kind.options)}]


def has_pair(method: str) -> bool:
    """Return whether a method trains two factors of each weight, as preconditioners need."""
    return METHODS[method].pair is not Adapter.pair


def export_refusal(method: str, form: str) -> str | None:
    """Return why a method has no export of this form; None if it has one."""
    kind = METHODS[method]
    form = "merged" if form == "compressed-tensors" else form  # which can be made of merged weights
    found = kind.export_refusals.get(form)
    if found is None and form != "merged" and kind.delta is not Adapter.delta:
        found = "{method} trains a part that is no product of two factors, which PEFT has not; use --to merged"
    return None if found is None else found.format(method=method)


def options_for(options: AdapterOptions, kind: type[Adapter], module: str, others: Iterable[str]) -> AdapterOptions:
    """Return the options of one weight, whose scale is that of all others: its rank may differ from theirs.

    An expert has at most EXPERT_RANK by default. With lora's option rank_end the ranks go linearly with the depth of
    the block, from `rank` in the first to rank_end in the last (PRILoRA, arXiv:2401.11316), rounded to whole numbers.

    Args:
        module: Path of its layer.
        others: Those of all layers of the model that can be trained.
    """
    options = expert_options(options, kind, module)
    end = options.own.get("rank_end") if "rank_end" in _names_of(kind) else None
    if end is None:
        return options
    first, last = kind.defaults.rank_of(options, 0), max(map(_depth, others))
    if not last or first < 1:
        return options
    rank = round(first + (end - first) * _depth(module) / last)
    share = rank / first
    alpha = kind.defaults.alpha_of(options, first) * (math.sqrt(share) if options.rslora else share)
    return replace(options, rank=rank, alpha=alpha)


def _depth(module: str) -> int:
    """Return the number of the block of a layer, from 0."""
    return next((int(part) for part in module.split(".") if part.isdigit()), 0)


def expert_options(options: AdapterOptions, kind: type[Adapter], module: str) -> AdapterOptions:
    """Return the options of one weight: an expert has at most EXPERT_RANK by default, and the scale of all others."""
    default = kind.defaults.rank
    if options.rank is not None or "rslora" not in kind.shared_options or not is_expert(module):
        return options
    if default is None or default <= EXPERT_RANK:
        return options
    share = EXPERT_RANK / default
    alpha = kind.defaults.alpha_of(options, default) * (math.sqrt(share) if options.rslora else share)
    return replace(options, rank=EXPERT_RANK, alpha=alpha)


def kind_of(method: str, module: str, ranks: Mapping[str, int], targets: Sequence[str] = ()) -> type[Adapter]:
    """Return the adapter class of one weight: Frozen if it is not to be trained, or lacks components that are needed.

    Args:
        module: Path of its layer.
        ranks: The stored ranks of all weights that can be trained, by the paths of their layers. If those of all layers
            to train are 0, the method itself refuses to start.
        targets: Names of the layers to train; empty is all.
    """
    if module not in ranks or not is_target(module, targets):
        return Frozen
    kind = METHODS[method]
    lacks = kind.needs_components and ranks[module] == 0
    return Frozen if lacks and any(rank and is_target(name, targets) for name, rank in ranks.items()) else kind
