"""The token that fills shorter sequences: decided here alone, and written into the quantized model.

Classifiers of decoders read the class at the last token that is not this one, so training, eval, export and every
other program that opens the model have to agree on it.
"""

import copy
from pathlib import Path
from typing import Any

from qsvd.files.atomic import read_object, write_json
from qsvd.inputs.model_files import TOKENIZER, from_folder

FIELD = "pad_token"
TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json")  # that name the token


def set_padding(tokenizer: Any, config: dict[str, Any]) -> None:
    """Give a tokenizer the padding token of a model, or none where there is none.

    It is the first that the model has a row for: that of config.json if it is a special token and no end token, since
    encoders count positions by it; the tokenizer's own; that of config.json; the end token; the unknown token.
    """
    config = _text_config(config)
    rows, stated, ends = config.get("vocab_size"), config.get("pad_token_id"), config.get("eos_token_id")
    is_special = type(stated) is int and stated in {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    from_config = tokenizer.convert_ids_to_tokens(stated) if is_special else None
    is_end = stated in (*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id)
    own = [tokenizer.pad_token, from_config] if is_end else [from_config, tokenizer.pad_token]
    for token in (*own, tokenizer.eos_token, tokenizer.unk_token):
        if token is not None and (type(rows) is not int or tokenizer.convert_tokens_to_ids(token) < rows):
            tokenizer.pad_token = token
            return
    tokenizer.pad_token = None


def padding_of(folder: Path | None, config: dict[str, Any]) -> tuple[str, int] | None:
    """Return the padding token of a model and its number; None without a tokenizer, or where it has none.

    Args:
        folder: Of the tokenizer.
        config: What config.json of the model says.

    Raises:
        BadInput: transformers cannot open the tokenizer.
    """
    from transformers import AutoTokenizer

    if folder is None or not any(path.is_file() for name in TOKENIZER.files for path in folder.glob(name)):
        return None
    tokenizer = from_folder(AutoTokenizer, folder, TOKENIZER)
    set_padding(tokenizer, config)
    return None if tokenizer.pad_token is None else (str(tokenizer.pad_token), tokenizer.pad_token_id)


def with_padding(config: dict[str, Any], padding: tuple[str, int] | None) -> dict[str, Any]:
    """Return the text of config.json, as a table, with the number of the padding token."""
    if padding is None or _text_config(config).get(f"{FIELD}_id") == padding[1]:
        return config
    changed = copy.deepcopy(config)
    _text_config(changed)[f"{FIELD}_id"] = padding[1]
    return changed


def write_padding(folder: Path, padding: tuple[str, int] | None) -> None:
    """Write the padding token into the files of a copied tokenizer that do not have it."""
    if padding is None:
        return
    for name in TOKENIZER_FILES:
        path = folder / name
        table = read_object(path) if path.is_file() else {}
        named = table.get(FIELD)
        found = named.get("content") if isinstance(named, dict) else named
        if found != padding[0] and (name == TOKENIZER_FILES[0] or FIELD in table):
            write_json(path, table | {FIELD: padding[0]})


def config_of(folder: Path) -> dict[str, Any]:
    """Return what config.json of a folder says; nothing if there is none."""
    path = folder / "config.json"
    return read_object(path) if path.is_file() else {}


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the part of config.json with the tokens of the language model, as transformers looks for it."""
    found = config.get("text_config")
    return found if isinstance(found, dict) else config
