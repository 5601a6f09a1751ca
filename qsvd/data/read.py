"""Rows from a source that a user names: a file, a folder with a file for each split, or a data set of the hub."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qsvd.data.row_files import SUFFIXES, Places, Rows, read_file
from qsvd.errors import BadInput, first_line, listing
from qsvd.inputs.paths import HUB_ID

if TYPE_CHECKING:
    from datasets import DatasetDict

VALID_NAMES = ("valid", "validation", "dev", "test")  # names of the validation split, preferred first
SYNONYMS = VALID_NAMES[:3]
SHARDED = (".jsonl", ".parquet")  # suffixes of shards


def read_rows(source: str | Path, *, split: str = "train") -> Rows:
    """Return all rows of one split.

    Args:
        source: A file (.jsonl .json .csv .parquet .txt), a folder with one such file for each split (train.jsonl,
            valid.jsonl), or a hub id "owner/name", "owner/name:config". Something that exists here, or looks like a
            path, is never looked up on the hub.
        split: In a folder, the name of the file without its suffix; on the hub, the split. valid, validation and dev
            mean the same. A file has only "train".

    Raises:
        BadInput: source or split does not exist, a split has two files, or as `read_file`.
    """
    names = SYNONYMS if split in SYNONYMS else (split,)
    local = local_data(source)
    if local is None:
        found = _hub_split(str(source), names)
    elif local.is_dir():
        found = _read_shards(local, names)
    elif split == "train":
        return read_file(local)
    else:
        raise BadInput(f"{local} is one file and has no split {split!r}; leave the split out, or give the folder")
    if found is None:
        raise BadInput(_no_split(str(source), local, names))
    return found


def read_pair(source: str | Path) -> tuple[Rows, Rows | None]:
    """Return the training rows, and the rows of the split in VALID_NAMES if the source has one.

    Raises:
        BadInput: as `read_rows`.
    """
    local = local_data(source)
    train = read_rows(source)
    if local is None:
        return train, _hub_split(str(source), VALID_NAMES)
    return train, _read_shards(local, VALID_NAMES) if local.is_dir() else None


def read_train(data: str, split: str, valid: str | None, *, is_read: bool = False) -> tuple[Rows, Rows | None]:
    """Return the rows to train, and those of the validation data if there are any.

    Args:
        split: Of the rows to train.
        valid: The validation data that were asked for; None is the split in VALID_NAMES beside "train".
        is_read: Whether the rows to train are read elsewhere: then there are none here.

    Raises:
        BadInput: as `read_rows`.
    """
    none = Rows([], Places(data, "row", []))
    if valid is None and split == "train" and not is_read:
        return read_pair(data)
    train = none if is_read else read_rows(data, split=split)
    if valid is not None:
        return train, read_rows(valid, split="train" if Path(valid).expanduser().is_file() else "valid")
    folder = Path(data).expanduser()
    return train, _read_shards(folder, VALID_NAMES) if split == "train" and folder.is_dir() else None


def local_data(source: str | Path) -> Path | None:
    """Return the file or folder that a source names, or None if it can only be a data set of the Hub.

    Raises:
        BadInput: it is neither.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    text = str(source)
    looks_like_path = (
        isinstance(source, Path)
        or text.startswith((".", "~", os.sep))
        or text.count("/") > 1
        or "\\" in text
        or (path.suffix and ("/" not in text or path.suffix.lower() in SUFFIXES))
    )
    if looks_like_path:
        raise BadInput(f"no such file or folder: {text}")
    if not HUB_ID.fullmatch(text.partition(":")[0]):
        raise BadInput(f"no file or folder {text!r} here, and a hub id looks like 'owner/name' or 'owner/name:config'")
    return None


def shard_files(folder: Path, names: Sequence[str]) -> tuple[Path, ...]:
    """Return the file of the first of some names of a split that has one, or its shards: train-00000-of-00002.jsonl.

    Raises:
        BadInput: a split has two files that are not its shards, or shards with two suffixes.
    """
    for name in names:
        whole = _split_file(folder, (name,))
        shard = re.compile(rf"{name}-\d+(-of-\d+)?")
        found = (path for path in folder.glob(f"{name}-*") if path.is_file() and path.suffix in SHARDED)
        shards = sorted(path for path in found if shard.fullmatch(path.stem))
        if len({path.suffix for path in shards} | ({"whole"} if whole and shards else set())) > 1:
            names_there = listing([path.name for path in (*([whole] if whole else []), *shards)])
            raise BadInput(
                f"{folder} has several files for one split, {names_there}: keep one, or shards with one suffix"
            )
        if whole or shards:
            return (whole,) if whole else tuple(shards)
    return ()


def _read_shards(folder: Path, names: Sequence[str]) -> Rows | None:
    """Return the rows of the files of a split one after another; None if there is none."""
    files = shard_files(folder, names)
    if len(files) < 2:
        return read_file(files[0]) if files else None
    rows = [row for path in files for row in read_file(path).rows]
    return Rows(rows, Places(f"{folder} ({len(files)} files)", "row", range(1, len(rows) + 1)))


def part_files(folder: Path) -> dict[str, Path | None]:
    """Return the files of the splits train, valid and test of a folder; None for one that it lacks.

    Raises:
        BadInput: a split has two files.
    """
    return {name: _split_file(folder, SYNONYMS if name == "valid" else (name,)) for name in ("train", "valid", "test")}


def _split_file(folder: Path, names: Sequence[str]) -> Path | None:
    """Return the file of the first name that has one."""
    for name in names:
        files = [folder / f"{name}{suffix}" for suffix in SUFFIXES if (folder / f"{name}{suffix}").is_file()]
        if len(files) > 1:
            raise BadInput(
                f"{folder} has several files for one split, {listing([path.name for path in files])}: keep one"
            )
        if files:
            return files[0]
    return None


def _no_split(source: str, local: Path | None, names: Sequence[str]) -> str:
    if local is None:
        there = sorted(map(str, _hub_splits(source)))
        return f"{source!r} on the hub has no split {' or '.join(names)}; it has {listing(there)}"
    files = sorted(path.name for path in local.iterdir())
    if "config.json" in files:
        return f"{source} is a model, and DATA is a file, a folder or a data set of the Hub with examples to train on"
    return (
        f"{source} has no file {' or '.join(names)} with a suffix of {', '.join(SUFFIXES)}; "
        f"in it: {listing(files) if files else 'nothing'}"
    )


def _hub_split(source: str, names: Sequence[str]) -> Rows | None:
    splits = _hub_splits(source)
    name = next((name for name in names if name in splits), None)
    if name is None:
        return None
    rows = splits[name].to_list()
    if not rows:
        raise BadInput(f"the split {name!r} of {source!r} on the hub is empty: it has no rows")
    return Rows(rows, Places(f"{source} ({name})", "row", range(1, len(rows) + 1)))


def _hub_splits(source: str) -> "DatasetDict":
    """Return all splits, memory-mapped from the cache of the datasets library after the first call."""
    import datasets
    from datasets.exceptions import DatasetsError

    name, _, config = source.partition(":")
    try:
        splits = datasets.load_dataset(name, config or None)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        several = re.search(r"available configs: (\[.*\])", str(error), re.DOTALL)
        if several:
            raise BadInput(
                f"{source!r} on the hub has several configurations; choose {name}:CONFIG of {several[1]}"
            ) from error
        raise BadInput(
            f"no file or folder {source!r} here, and no data set of that name on the hub: {first_line(error)}"
        ) from error
    assert isinstance(splits, datasets.DatasetDict), "without a split and not streaming, load_dataset gives all splits"
    return splits
