"""A 16-bit checkpoint as transformers stores it: a folder or a hub id -> its config, and its tensors one at a time.

Opening reads headers only. What the config promises and whether the checkpoint is already quantized is for `check`.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qsvd.checkpoint.drawn import DrawnEntry
from qsvd.checkpoint.hub import SMALL_FILES, download
from qsvd.checkpoint.index import read_object, read_weight_map
from qsvd.checkpoint.pickle_file import PickleEntry, read_pickle_header, read_pickled
from qsvd.checkpoint.tensor_file import TensorEntry, read_header, read_tensor
from qsvd.plan.listing import first_line, listing

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Entry = TensorEntry | PickleEntry | DrawnEntry

SAFE, PICKLED = "model.safetensors", "pytorch_model.bin"  # the names that transformers looks for, in this order
SAMPLES, SAMPLE_BYTES = 64, 4096  # of each weight file, for the fingerprint
LARGEST_COPY = 50 * 10**6  # bytes; a tokenizer file is smaller, a stray weight file larger
NOT_COPIED = ("config.json", "*.index.json", "README*", ".*", "adapter_config.json", "trainer_state.json")


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint; nothing but headers is in memory."""

    name: str  # as given: a folder or a hub id; of drawn values a description
    folder: Path | None  # None where the values are drawn
    revision: str | None  # the hub's commit; None for a folder
    config: "PreTrainedConfig" = field(repr=False)
    config_json: dict[str, Any] = field(repr=False)  # config.json as it is
    tensors: dict[str, Entry] = field(repr=False)
    other_files: tuple[Path, ...]  # tokenizer, generation and chat template files, to copy beside the result
    fingerprint: str  # sha256 of config.json and of every weight file's header, size and a sample of its bytes

    def read(self, name: str) -> torch.Tensor:
        """The tensor of this name, in memory of its own, in the dtype and shape of its entry.

        On the CPU, but for a drawn one, which is where it was made.
        """
        entry = self.tensors[name]
        if isinstance(entry, DrawnEntry):
            return entry.make()
        return read_tensor(entry) if isinstance(entry, TensorEntry) else read_pickled(entry)


def open_checkpoint(model: str) -> Checkpoint:
    """Open a local folder, which never touches the network, or else a model of the hub.

    Args:
        model: A folder with config.json and model.safetensors, its index and shards, or the same as pytorch_model.bin;
            or a hub id, "owner/name".

    Raises:
        ValueError: no such folder or id; config.json or the weights are missing, damaged or of an unknown format.
    """
    folder = Path(model).expanduser()
    is_local = model != "" and folder.is_dir()
    if not is_local:
        if folder.is_file():
            raise ValueError(f"{model!r} is a file; give the folder that holds it and config.json")
        folder = download(model)
    _refuse_gguf(folder)
    config, config_json = _read_config(folder)
    tensors, seen = _read_tensors(folder)
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(seen):
        digest.update(f"\n{file} {(folder / file).stat().st_size}\n".encode() + seen[file])
    return Checkpoint(
        name=model,
        folder=folder,
        revision=None if is_local else folder.name,
        config=config,
        config_json=config_json,
        tensors=tensors,
        other_files=other_files(folder),
        fingerprint=digest.hexdigest(),
    )


def _refuse_gguf(folder: Path) -> None:
    gguf = sorted(path.name for path in folder.glob("*.gguf"))
    if gguf and not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{folder} holds GGUF files ({listing(gguf)}), which are quantized or for llama.cpp only; "
            "give the 16-bit safetensors checkpoint that they were made from"
        )


def _read_config(folder: Path) -> tuple["PreTrainedConfig", dict[str, Any]]:
    path = folder / "config.json"
    if not path.is_file():
        adapter = (folder / "adapter_config.json").is_file()
        hint = "this is an adapter: give its base model" if adapter else "give the folder of a transformers checkpoint"
        raise ValueError(f"no config.json in {folder}; {hint}")
    config_json = read_object(path)
    return read_config(folder), config_json


def read_config(path: Path) -> "PreTrainedConfig":
    """What transformers makes of a config.json, given as the file itself or as its folder.

    Raises:
        ValueError: it makes nothing of it; the sentence says why.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    file = path / "config.json" if path.is_dir() else path
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (ValueError, TypeError, KeyError, AttributeError, OSError, ImportError, StrictDataclassError) as error:
        raise ValueError(f"transformers makes no config of {file}: {first_line(error)}") from error


def _read_tensors(folder: Path) -> tuple[dict[str, Entry], dict[str, bytes]]:
    """Every tensor by name, and for every weight file the bytes that describe its tensors."""
    for weights in (SAFE, PICKLED):
        index = folder / f"{weights}.index.json"
        if (folder / weights).is_file():
            return _read_files(folder, [weights])
        if index.is_file():
            return _read_indexed(folder, index)
    found = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pt", ".h5"))
    raise ValueError(
        f"no weights in {folder}: neither {SAFE} nor {PICKLED} nor an index of either is there"
        + (f", only {listing(found)}" if found else "")
    )


def _read_indexed(folder: Path, index: Path) -> tuple[dict[str, Entry], dict[str, bytes]]:
    weight_map = read_weight_map(index)
    files = sorted(set(weight_map.values()))
    absent = [file for file in files if not (folder / file).is_file()]
    if absent:
        raise ValueError(f"{len(absent)} of {len(files)} shards of {folder} are missing: {listing(absent)}")
    tensors, seen = _read_files(folder, files)
    lacking = [f"{name} ({file})" for name, file in weight_map.items() if name not in tensors]
    if lacking:
        raise ValueError(f"{index} promises {len(lacking)} tensors that its shards lack: {listing(lacking)}")
    return tensors, seen


def _read_files(folder: Path, files: Iterable[str]) -> tuple[dict[str, Entry], dict[str, bytes]]:
    """The tensors of all files; the errors of all damaged files as one."""
    tensors: dict[str, Entry] = {}
    seen: dict[str, bytes] = {}
    errors = []
    for file in files:
        try:
            found, seen[file] = _read_one(folder / file)
        except ValueError as error:
            errors.append(str(error))
            continue
        twice = [name for name in found if name in tensors]
        if twice:
            errors.append(f"{folder / file} repeats tensors of another shard: {listing(twice)}")
        tensors |= found
    if errors:
        raise ValueError("; ".join(errors[:5]) + (f"; and {len(errors) - 5} more" if len(errors) > 5 else ""))
    return tensors, seen


def _read_one(path: Path) -> tuple[dict[str, Entry], bytes]:
    if path.suffix == ".bin":
        pickled = read_pickle_header(path)
        described = [(name, entry.dtype, entry.shape) for name, entry in pickled.items()]
        return dict(pickled), json.dumps(described).encode() + _sample(path)
    header = read_header(path)
    return dict(header.tensors), header.raw + _sample(path)


def _sample(path: Path) -> bytes:
    """A few kilobytes from all over a file: two models of the same shapes differ there."""
    size = path.stat().st_size
    samples = []
    with path.open("rb") as file:
        for number in range(SAMPLES):
            file.seek(number * max(size - SAMPLE_BYTES, 0) // (SAMPLES - 1))
            samples.append(file.read(SAMPLE_BYTES))
    return b"".join(samples)


def other_files(folder: Path) -> tuple[Path, ...]:
    """What else a user of the result needs: small files of the kinds that tokenizers are stored in, and the licence."""

    def is_copied(path: Path) -> bool:
        wanted = any(path.match(pattern) for pattern in SMALL_FILES)
        refused = any(path.match(pattern) for pattern in NOT_COPIED)
        return path.is_file() and wanted and not refused and path.stat().st_size <= LARGEST_COPY

    return tuple(sorted(path for path in folder.iterdir() if is_copied(path)))
