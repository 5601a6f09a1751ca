"""What transformers reads of a model's folder: config, tokenizer, processor, generation settings, weights.

Every call of a `from_pretrained` of transformers goes through `from_folder`: local files only, no code of the
checkpoint, and a sentence with the path of the file that is damaged. Nothing here imports torch.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

from qsvd.errors import BadInput, first_line, listing

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Part:
    """What transformers reads of a folder.

    Args:
        name: "tokenizer".
        files: Names of its files, or patterns of names; one of them is enough.
        others: Files that are read too.
        advice: What to do where there is none of its files.
    """

    name: str
    files: tuple[str, ...]
    others: tuple[str, ...] = ()
    advice: str = "download it again"


TEMPLATES = ("chat_template.json", "chat_template.jinja", "additional_chat_templates/*.jinja")
CONFIG = Part("config", ("config.json",))
GENERATION = Part("generation settings", ("generation_config.json",))
MODEL = Part("model", ("config.json",), ("*.index.json", *GENERATION.files))
TOKENIZER = Part(
    "tokenizer",
    ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "merges.txt", "*.model"),
    ("special_tokens_map.json", "added_tokens.json", *TEMPLATES),
    "copy the tokenizer files of the 16-bit model there",
)


def processor_of(what: str) -> Part:
    """Return the processor of images or of sound."""
    advice = "copy processor_config.json or preprocessor_config.json of the 16-bit model there"
    own = ("processor_config.json", "*preprocessor_config.json")
    return Part(f"processor of {what}", own, (*TOKENIZER.files, *TOKENIZER.others), advice)


# names of numbers in a config.json, and the largest that is read; the largest models have 126 layers and 2,048 experts
COUNTS = {
    "layers": (re.compile(r"(layers?|blocks|depths?|predict_layers)(_\d+)?$"), 2000),
    "experts": (re.compile(r"experts?$"), 10_000),
    "heads": (re.compile(r"heads?$"), 100_000),
    "classes": (re.compile(r"num_labels$"), 1_000_000),
    "sizes": (re.compile(r"(size|dims?|width|channels|d_model|d_ff|d_kv|n_embd|n_inner|rank|groups|kernel)$"), 10**8),
    "lengths": (re.compile(r"(positions|position_embeddings|max_seq_len|n_ctx|window)$"), 10**10),
}
AT_LEAST_ONE = (
    *("vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers", "d_model", "n_embd", "n_head"),
    *("max_position_embeddings", "n_positions"),
)
MOST_ID = 10**9  # of a token
MOST_DEPTH = 50  # of lists and objects in a config


def from_folder(reader: Any, folder: Path, part: Part, **options: Any) -> Any:
    """Let a class of transformers read a part of a model's folder by its `from_pretrained`.

    Args:
        reader: The class, as AutoTokenizer.
        folder: For a config, also its file itself.
        options: More arguments of `from_pretrained`.

    Raises:
        BadInput: it refuses the files, for whatever reason; the sentence names the file that is damaged, if one is.
    """
    if part is not CONFIG and (folder / "config.json").is_file():
        check_config(folder / "config.json")  # transformers reads it for every part
    try:
        return reader.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    except BaseException as error:
        if _is_not_of_the_files(error):
            raise
        raise BadInput(_sentence(folder, part, error)) from error


def _sentence(folder: Path, part: Part, error: BaseException) -> str:
    if damaged := damaged_file(folder, part):
        return f"{damaged}; download it again, or copy it from where it is whole"
    own = [folder] if folder.is_file() else _found(folder, part.files)
    if not own:
        return f"{folder} has no {part.name} that transformers can open; {part.advice}"
    if isinstance(error, ImportError):
        return f"the {part.name} of {folder} needs another library: {first_line(error)}"
    names = listing([path.name for path in own])
    files = own[0] if len(own) == 1 else f"the {part.name} of {folder} ({names})"
    return f"transformers cannot read {files}: {first_line(error)}; {part.advice}"


def _is_not_of_the_files(error: BaseException) -> bool:
    """Return whether an error says nothing about the files: too little memory, a signal, a disk, or a BadInput."""
    if not isinstance(error, Exception):
        return type(error).__name__ != "PanicException"  # of the tokenizers library, which is written in Rust
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, FileNotFoundError):
        return True
    return isinstance(error, (BadInput, MemoryError)) or type(error).__name__ == "OutOfMemoryError"


def damaged_file(folder: Path, part: Part) -> str:
    """Return what is wrong with the first file that is not a text, or not the JSON that it has to be; else ""."""
    files = [folder] if folder.is_file() else _found(folder, (*part.files, *part.others))
    for path in (path for path in files if path.suffix != ".model"):
        try:
            text = path.read_bytes().decode("utf-8")
            table = json.loads(text) if path.suffix == ".json" else {}
        except UnicodeDecodeError as error:
            return f"{path} is not a text in UTF-8 ({first_line(error)})"
        except (ValueError, RecursionError) as error:
            return f"{path} is not valid JSON ({first_line(error)})"
        if not isinstance(table, dict):
            return f"{path} is a JSON {type(table).__name__}, not an object"
    return ""


def _found(folder: Path, patterns: Sequence[str]) -> list[Path]:
    return sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file())


def read_config_json(path: Path) -> "PreTrainedConfig":
    """Let transformers read a config.json, given as the file itself or as its folder.

    Raises:
        BadInput: transformers refuses it, or a number in it is absurd; the sentence says why.
    """
    from transformers import AutoConfig, PreTrainedConfig

    file = path / "config.json" if path.is_dir() else path
    check_config(file)
    config = from_folder(AutoConfig, path, CONFIG)
    kind, wrong = type(config), ""
    if not isinstance(config.get_text_config(), PreTrainedConfig):
        wrong = "its text_config is no config of a model"
    elif config.is_encoder_decoder not in (False, getattr(kind, "is_encoder_decoder", True)):
        wrong = f"is_encoder_decoder is {config.is_encoder_decoder}, and a {config.model_type} has no encoder"
    if wrong:
        raise BadInput(f"{file} is damaged: {wrong}; download it again")
    return config


def generation_config(folder: Path, config: "PreTrainedConfig") -> Any:
    """Return transformers' GenerationConfig of a model's folder: its generation_config.json, else from its config."""
    from transformers import GenerationConfig

    path = folder / "generation_config.json"
    if not path.is_file():
        return GenerationConfig.from_model_config(config)
    found = from_folder(GenerationConfig, folder, GENERATION)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        check_ids(path, name, getattr(found, name))
    return found


def check_ids(path: Path, name: str, value: Any) -> list[int]:
    """Return the tokens of a field of a generation_config.json, none for null; refuse what is no token by BadInput."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(number) is int and abs(number) < MOST_ID for number in ids):
        raise BadInput(f"{path} is damaged: {name} is {value}, not the number of a token; download it again")
    return ids


def _kernels(table: Any) -> Iterator[tuple[str, str]]:
    """Yield the keys of a config, and of configs in it, that name a kernel of the Hub: attn_implementation "a/b"."""
    if isinstance(table, list):
        for item in table:
            yield from _kernels(item)
    if isinstance(table, dict):
        for key, value in table.items():
            chosen = [*value.values()] if isinstance(value, dict) else [value]
            if key.removesuffix("_internal").endswith("_implementation"):
                yield from ((key, one) for one in chosen if isinstance(one, str) and "/" in one)
            yield from _kernels(value)


def check_config(file: Path) -> None:
    """Refuse a config.json that names code, or has numbers of layers, sizes and so on that no model has.

    Raises:
        BadInput: the file is no JSON object, or has such numbers: the sentence names every one of them.
    """
    if damaged := damaged_file(file, CONFIG):
        raise BadInput(f"{damaged}; download it again")
    table = json.loads(file.read_bytes())
    if kernels := [f"{name} {value!r}" for name, value in _kernels(table)]:
        raise BadInput(
            f"{file} chooses code of the Hub, which transformers would download and run: {listing(kernels)}; remove "
            "these keys"
        )
    wrong = [f"{name} {value} {fault}" for name, value in _numbers(file, table, "") if (fault := _fault(name, value))]
    classes = table.get("architectures") or []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        wrong.append(f"architectures {json.dumps(classes)} is no list of names of classes")
    if not isinstance(table.get("quantization_config"), (dict, NoneType)):
        wrong.append("quantization_config is no object")
    if wrong:
        raise BadInput(f"{file} is damaged: {listing(wrong, separator='; ')}; download it again")


def _numbers(file: Path, value: Any, name: str, depth: int = 0) -> Iterator[tuple[str, float]]:
    """Yield all numbers of a config and their names; those of a list have the list's name."""
    if depth > MOST_DEPTH:
        raise BadInput(f"{file} is damaged: {name.split('.')[0]} is nested deeper than {MOST_DEPTH}; download it again")
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(file, item, f"{name}.{key}" if name else key, depth + 1)
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(file, item, name, depth + 1)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield name, value


def _fault(name: str, value: float) -> str:
    """Return what is wrong with a number of a config; "" if it may be one."""
    last = name.rpartition(".")[2]
    if value != value:
        return "is not a number"
    if last in AT_LEAST_ONE and value < 1:
        return "is below 1"
    for pattern, most in COUNTS.values():
        if pattern.search(last) and value > most:
            return f"is above {most:,}"
    return ""
