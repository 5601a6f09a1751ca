"""Mutations of files that torch.save has written."""

import pickle
from pathlib import Path
from random import Random
from typing import Any

CODE_RAN = "PWNED"  # the file that code of a pickle, a template or a YAML file would make


class _Code:
    """A pickle that makes a file when it is loaded."""

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (CODE_RAN, "w")


def pickled(path: Path, random: Random) -> str:
    """Replace a file of torch.save by one with code in it, with another value, or with one value changed."""
    import torch

    how = random.choice(["code", "code in torch.save", "a list", "a tensor", "value", "value"])
    if how == "code":
        path.write_bytes(pickle.dumps(_Code()))
        return how
    others = {"code in torch.save": {"state": _Code()}, "a list": [1, 2, 3], "a tensor": torch.zeros(3)}
    value = others[how] if how in others else torch.load(path, weights_only=False)
    said = how if how in others else _change(value, random)
    torch.save(value, path)
    return said


def _change(value: Any, random: Random) -> str:
    """Change one value that is somewhere in nested dictionaries and lists."""
    import torch

    steps: list[str] = []
    while isinstance(value, dict | list) and len(value):
        key = random.choice([*value] if isinstance(value, dict) else [*range(len(value))])
        steps.append(str(key))
        inner = value[key]
        if not isinstance(inner, dict | list) or not len(inner) or random.random() < 0.2:
            others = [None, -1, "x", [], 1e30, float("nan"), {}]
            value[key] = inner + 1 if isinstance(inner, torch.Tensor) else random.choice(others)
            return f"{'.'.join(steps)} is {str(value[key])[:20]!r}"
        value = inner
    return "saved again"
