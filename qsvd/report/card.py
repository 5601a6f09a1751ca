"""The YAML header of a model card, as the Hub reads it, and what the card of a 16-bit model hands on."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

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
    found = {key: card[key] for key in HANDED_ON if card.get(key)}
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


def _metadata(path: Path) -> dict[str, Any]:
    """Return the YAML header of a card; nothing if there is none or it cannot be read."""
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    try:
        return (metadata_load(path) or {}) if path.is_file() else {}
    except (ValueError, YAMLError):
        return {}


def _license(folder: Path) -> str | None:
    """Return the Hub's name of the license in LICENSE, if it is one of LICENSES."""
    for path in sorted(folder.glob("LICENSE*")):
        words = " ".join(path.read_text(encoding="utf-8", errors="replace")[:500].split())
        for start, name in LICENSES.items():
            if words.startswith(" ".join(start.split())):
                return name
    return None
