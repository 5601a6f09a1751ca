"""HTML, made of elements. `escaped` is the only way of a text into the page: no text becomes markup or script."""

import re
from collections.abc import Iterable
from html import escape

from qsvd.errors import one_line

MOST_OF_A_NAME = 120  # characters; a longer name is cut in the middle
MOST_OF_A_TEXT = 4000
VOID = frozenset({"meta", "input", "wbr", "path", "line", "rect"})  # elements without a content
NAME = re.compile(r"[a-zA-Z][a-zA-Z0-9-]*")


class Markup(str):
    """A text that is HTML already."""

    __slots__ = ()


Child = Markup | str | int | None


def escaped(text: object) -> Markup:
    """Return a text, long ones cut, as HTML that shows it as it is; control characters and directions are escapes."""
    return Markup(escape(one_line(shortened(str(text), MOST_OF_A_TEXT))))


def shortened(text: str, most: int = MOST_OF_A_NAME) -> str:
    """Return a text of at most so many characters, cut in the middle."""
    if len(text) <= most:
        return text
    half = (most - 1) // 2
    return f"{text[:half]}…{text[-half:]}"


def tag(name: str, /, *children: Child | Iterable[Child], **attributes: object) -> Markup:
    """Return an element.

    Args:
        name: Of the element; from the code, never from data.
        children: Markup, texts, which are escaped, or iterables of these; None is nothing.
        attributes: Their values are escaped; True is an attribute without a value, None and False are left out. An
            underscore in a name is a hyphen, one at the end is nothing: class_, aria_label.
    """
    assert NAME.fullmatch(name), "names of elements stand in the code"
    words = "".join(_attribute(key, value) for key, value in attributes.items() if value not in (None, False))
    if name in VOID:
        return Markup(f"<{name}{words}>" if name in ("meta", "input", "wbr") else f"<{name}{words}/>")
    return Markup(f"<{name}{words}>{join(children)}</{name}>")


def join(children: Iterable[Child | Iterable[Child]]) -> Markup:
    """Return several pieces after each other, texts escaped."""
    return Markup("".join(_piece(child) for child in children))


def _piece(child: Child | Iterable[Child]) -> str:
    if child is None:
        return ""
    if isinstance(child, Markup):
        return child
    return escaped(child) if isinstance(child, str | int) else join(child)


def _attribute(key: str, value: object) -> str:
    name = {"viewBox": "viewBox", "preserveAspectRatio": "preserveAspectRatio"}.get(key, key.rstrip("_"))
    name = name.replace("_", "-")
    assert NAME.fullmatch(name), "names of attributes stand in the code"
    return f" {name}" if value is True else f' {name}="{escaped(value)}"'
