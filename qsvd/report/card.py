"""The YAML header of a model card, as the Hub reads it, and what the card of a 16-bit model hands on.

Also text from outside, such as names and paths, as Markdown, as a word of a shell and as a text of Python.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any, Literal

from qsvd.errors import one_line
from qsvd.option_file import MOST_BYTES, read_yaml

MARKS = frozenset("\\|`*_[]<>&~$#")  # of Markdown and HTML, in a line
LICENSES = {"Apache License\nVersion 2.0": "apache-2.0", "MIT License": "mit"}  # first words of the file
HANDED_ON = ("license", "license_name", "license_link", "pipeline_tag", "language")
PIPELINES = {  # ending of the architecture -> the Hub's task
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForImageClassification": "image-classification",
}


def card_header(
    origin: Mapping[str, Any], relation: Literal["quantized", "adapter", "finetune"], library: str, tags: Sequence[str]
) -> str:
    """Return the YAML header of a README.md, with the lines that mark it.

    Args:
        origin: What is known of the model it was made from: base_model (a Hub id) and HANDED_ON.
        relation: To the base model, as the Hub defines it. Left out if the base model is not known.
    """
    from huggingface_hub import ModelCardData

    known = {key: value for key, value in origin.items() if key in ("base_model", *HANDED_ON)}
    if "base_model" in known:
        known["base_model_relation"] = relation
    data = ModelCardData(library_name=library, tags=["qsvd", *tags], **known)
    return f"---\n{data.to_yaml()}\n---\n\n"


def origin_of(folder: Path | None, name: str | None, architecture: str) -> dict[str, Any]:
    """Return what a model hands on to the cards of models made from it; what cannot be known is left out.

    Args:
        folder: Of the model, with its README.md and LICENSE, if it has them.
        name: The model's Hub id, if it has one.
        architecture: Class name in transformers.
    """
    card = {} if folder is None else _metadata(folder / "README.md")
    found = {key: card[key] for key in HANDED_ON if _is_short(card.get(key))}
    if "license" not in found and folder is not None and (license_ := _license(folder)):
        found["license"] = license_
    task = next((task for ending, task in PIPELINES.items() if architecture.endswith(ending)), None)
    if task is not None:
        found.setdefault("pipeline_tag", task)
    return found if name is None else {"base_model": name} | found


def header_of(card: str) -> str:
    """Return the YAML header of a card with the lines that mark it; "" if it has none."""
    found = re.match(r"---\n.*?\n---\n+", card, re.DOTALL)
    return found[0] if found else ""


def base_of(folder: Path) -> str | None:
    """Return the base model that the card in a folder names, or None."""
    base = _metadata(folder / "README.md").get("base_model")
    return base if isinstance(base, str) else None


def _is_short(value: object) -> bool:
    """Return whether a value of a card is a text of one line, or a list of such texts."""
    return bool(value) and all(
        isinstance(one, str) and one_line(one) == one for one in (value if isinstance(value, list) else [value])
    )


def _metadata(path: Path) -> dict[str, Any]:
    """Return the YAML header of a card; nothing if there is none or it cannot be read."""
    from yaml import YAMLError

    try:
        with path.open(encoding="utf-8") as file:
            header = header_of(file.read(2 * MOST_BYTES))
        found = read_yaml(header.strip().strip("-"))
    except (OSError, ValueError, YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _license(folder: Path) -> str | None:
    """Return the Hub's name of the license in LICENSE, if it is one of LICENSES."""
    for path in sorted(folder.glob("LICENSE*")):
        words = " ".join(path.read_text(encoding="utf-8", errors="replace")[:500].split())
        for start, name in LICENSES.items():
            if words.startswith(" ".join(start.split())):
                return name
    return None


# Text from outside.


def markdown(text: str) -> str:
    """Return words as a piece of a line that Markdown shows as they are."""
    return "".join(f"\\{mark}" if mark in MARKS else mark for mark in one_line(" ".join(text.split())))


def code(text: str, *, in_table: bool = False) -> str:
    """Return a name as code in a line of Markdown; a cell of a table ends at a | in code, too."""
    shown = one_line(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    pad = " " if shown.startswith("`") or shown.endswith("`") else ""
    cell = shown.replace("|", "\\|") if in_table else shown
    return f"{fence}{pad}{cell}{pad}{fence}"


def shell(*words: object) -> str:
    """Return words of a command line; what cannot stand in one line is an escape of bash, $'...'."""
    return " ".join(_word(str(word)) for word in words)


def _word(word: str) -> str:
    if one_line(word) == word:
        return quote(word)
    plain = word.replace("\\", "\\\\").replace("'", "\\'")
    return f"$'{''.join(_escaped(one) if one_line(one) != one else one for one in plain)}'"


def _escaped(character: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in character.encode())


def literal(text: str) -> str:
    """Return a text of Python in double quotes, in one line."""
    return json.dumps(text, ensure_ascii=False) if one_line(text) == text else repr(text)
