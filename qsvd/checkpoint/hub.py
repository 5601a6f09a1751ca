"""A model id of the Hugging Face hub -> a folder in the local cache, with no more files than qsvd reads."""

import re
from collections.abc import Sequence
from pathlib import Path

from qsvd.checkpoint.index import read_weight_map
from qsvd.plan.listing import first_line

SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.spm", "LICENSE*", "NOTICE*")
WEIGHT_INDEXES = ("model.safetensors", "pytorch_model.bin")  # preferred first
MODEL_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def download(model: str) -> Path:
    """The snapshot folder of a hub model; its name is the commit.

    Files below the top folder and weights in formats that are not needed stay on the hub.

    Raises:
        ValueError: `model` is no such model, or the hub cannot be reached and the cache does not have it.
    """
    _check_id(model)
    folder = _snapshot(model, SMALL_FILES, revision=None)
    for weights in WEIGHT_INDEXES:
        index = folder / f"{weights}.index.json"
        shards = sorted(set(read_weight_map(index).values())) if index.is_file() else []
        _snapshot(model, [weights, *shards], revision=folder.name)
        if shards or (folder / weights).is_file():
            break
    return folder


def download_config(model: str) -> Path:
    """The config.json of a hub model, and nothing else.

    Raises:
        ValueError: as `download` does, or the model has no config.json.
    """
    _check_id(model)
    path = _snapshot(model, ["config.json"], revision=None) / "config.json"
    if not path.is_file():
        raise ValueError(f"{model!r} on the hub has no config.json: it is no transformers model")
    return path


def _check_id(model: str) -> None:
    if not MODEL_ID.fullmatch(model):
        raise ValueError(f"no folder {model!r} here, and a hub id looks like 'owner/name'")


def _snapshot(model: str, patterns: Sequence[str], revision: str | None) -> Path:
    from huggingface_hub import errors, snapshot_download

    try:
        folder = snapshot_download(model, revision=revision, allow_patterns=list(patterns), ignore_patterns=["*/*"])
    except errors.GatedRepoError as error:
        raise ValueError(f"{model!r} on the hub is gated: accept its terms there, then run `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(f"no folder {model!r} here, and no such model on the hub (or it is private)") from error
    except (OSError, ValueError, errors.EntryNotFoundError, errors.RevisionResolutionError, errors.HTTPError) as error:
        raise ValueError(
            f"no folder {model!r} here, and the hub cannot be reached for a model of that name (offline?): "
            f"{first_line(error)}"
        ) from error
    return Path(folder)
