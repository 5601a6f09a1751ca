"""Which layers an adapter trains: names as PEFT's users give them, "q_proj", globs on paths, or "all-linear".

A name stands for every layer whose path ends with it, as in PEFT's target_modules.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from qsvd.errors import BadInput, listing

ALL = "all-linear"
FIRST, LAST = ("gate_up_proj", "up_proj"), "down_proj"  # stacks of experts: gate and up together or up alone; down
EVERYTHING, EXPERTS = ("*",), "*_proj.[0-9]*"  # globs: with the experts; the experts of all stacks
LEAST_LIKENESS = 0.5  # of a name that is shown for a misspelt one


def target_names(given: Sequence[str]) -> tuple[str, ...]:
    """Return the names one by one ("q_proj,v_proj" are two); empty for all layers."""
    names = [name for word in given for name in word.replace(",", " ").split()]
    return () if ALL in names else tuple(dict.fromkeys(names))


def is_expert(module: str) -> bool:
    """Return whether the path of a layer is that of an expert, "model.layers.0.mlp.experts.down_proj.3"."""
    *_, stack, number = ("", *module.split("."))
    return number.isdigit() and stack in (*FIRST, LAST)


def is_target(module: str, targets: Sequence[str]) -> bool:
    """Return whether a layer is trained; experts are not, unless they are named.

    Args:
        module: Its path, "model.layers.0.self_attn.q_proj".
        targets: From `target_names`.
    """
    if not targets:
        return not is_expert(module)
    return any(f".{module}".endswith(f".{name}") or fnmatchcase(module, name) for name in targets)


def check_targets(targets: Iterable[str], modules: Collection[str]) -> None:
    """Refuse names that stand for no layer.

    Args:
        modules: Paths of all layers that can be trained.

    Raises:
        BadInput: the sentence gives the nearest names.
    """
    unknown = [name for name in targets if not any(is_target(module, [name]) for module in modules)]
    if not unknown:
        return
    names = list(dict.fromkeys(module.rpartition(".")[2] for module in modules))
    paths = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", module) for module in modules))
    near = [near for name in unknown for near in get_close_matches(name, [*names, *paths], 2, LEAST_LIKENESS)]
    meant = f" (nearest: {', '.join(dict.fromkeys(near))})" if near else ""
    raise BadInput(
        f"--target-modules: no quantized layer is called {listing(unknown)}{meant}; give names such as "
        f"{listing(names, limit=8)}, globs on paths such as '{paths[0]}', or {ALL}"
    )
