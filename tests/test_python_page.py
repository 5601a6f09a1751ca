"""docs/python.md has a row for every public name, with the signature and the first sentence of its docstring."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import qsvd
from qsvd import api

PAGE = (Path(__file__).parent.parent / "docs" / "python.md").read_text(encoding="utf-8")
COMMANDS = {name for name in qsvd.__all__ if hasattr(api, name) and getattr(qsvd, name) is getattr(api, name)}
OTHERS = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
LONGEST = 16  # letters of a default that is shown


def call(name: str, thing: Any) -> str:
    """The call as the page shows it: of commands only what is given by place."""
    if isinstance(thing, type) and issubclass(thing, Exception):
        return name
    if thing is qsvd.Quantize:  # the options of a command
        return f"{name}(...)"
    parameters = inspect.signature(thing).parameters.values()
    if name in COMMANDS:
        marks = {inspect.Parameter.VAR_POSITIONAL: "*"}
        shown = [marks.get(p.kind, "") + p.name for p in parameters if p.kind not in OTHERS]
        return f"{name}({', '.join([*shown, '...'])})"
    return f"{name}({', '.join(map(shown_parameter, parameters))})"


def shown_parameter(parameter: inspect.Parameter) -> str:
    """A parameter with its default, if that is short."""
    if parameter.default is parameter.empty:
        return parameter.name
    default = repr(parameter.default)
    is_shown = len(default) <= LONGEST and not default.startswith("<")
    return f"{parameter.name}={default if is_shown else '...'}"


def first_sentence(thing: Any) -> str:
    """The first sentence of a docstring."""
    said = " ".join(inspect.getdoc(thing).partition("\n\n")[0].split())
    return re.split(r"(?<=[.]) |: qsvd\.", said)[0].rstrip(".") + "."


@pytest.mark.parametrize("name", qsvd.__all__)
def test_the_page_says_what_the_docstring_says(name: str) -> None:
    thing = getattr(qsvd, name)
    assert f"| `{call(name, thing)}` | {first_sentence(thing)} |" in PAGE.splitlines()
