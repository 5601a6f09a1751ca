"""A 16-bit model as transformers stores it: a folder or a hub id -> its config, and its tensors one at a time.

Opening reads headers only. `check` compares them with the config and refuses quantized models. Models that are
published in FP8 or MXFP4 are 16-bit models from here on: `published` decodes them.
"""

import hashlib
import json
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qsvd.errors import BadInput, first_line, listing
from qsvd.files.atomic import Stamp, check_stamp, read_object, stamp_of, whole_file
from qsvd.files.published import CodedEntry, decoded, is_published
from qsvd.files.safetensors import DTYPE_NAMES, TORCH_DTYPES, Entry, TensorEntry, read_header, read_tensor
from qsvd.inputs.model_files import read_config_json
from qsvd.inputs.paths import check_checkpoint, checkpoint_folder
from qsvd.plan.weights import Source, WeightSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SAFE, PICKLED = "model.safetensors", "pytorch_model.bin"  # the names that transformers looks for, in this order
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.spm", "LICENSE*", "NOTICE*", "README.md")
PRUNED_BY = "qsvd_prune.json"  # of a model that qsvd prune wrote: how it was made, and digests of its files
PRUNED_RECORD = "qsvd_pruned.json"  # of the same model: what was removed; copied to its quantized model
NOT_COPIED = ("config.json", "*.index.json", "README*", ".*", "adapter_config.json", "trainer_state.json", PRUNED_BY)
NAMED_TEMPLATES = "additional_chat_templates"  # a subfolder, in which transformers keeps the template for tools
LARGEST_COPY = 50 * 10**6  # bytes; a tokenizer file is smaller, a stray weight file larger
SAMPLES, SAMPLE_BYTES = 64, 4096  # of each weight file, for the fingerprint


@dataclass(frozen=True)
class PickleEntry(Entry):
    """A tensor in a pytorch_model.bin, found by its name."""

    file: Path
    stamp: Stamp


def _read_pickle_header(path: Path) -> dict[str, PickleEntry]:
    entries, stamp = {}, stamp_of(path.stat())
    for name, tensor in _load_pickle(path).items():
        if not isinstance(tensor, torch.Tensor) or tensor.dtype not in DTYPE_NAMES:
            raise BadInput(f"{path}: {name} is not a dense tensor; save the model's state_dict as safetensors")
        num_bytes = tensor.numel() * tensor.element_size()
        entries[name] = PickleEntry(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), num_bytes, path, stamp)
    return entries


def _read_pickled(entry: PickleEntry, part: Source) -> Tensor:
    """Read a part of a tensor into its own memory. The file is mapped only while the part is copied."""
    check_stamp(entry.file, entry.file.stat(), entry.stamp)
    values = _load_pickle(entry.file)[entry.name]
    if part.index is not None:
        values = values[part.index]
    if part.rows is not None:
        values = values[slice(*part.rows)]
    return values.clone(memory_format=torch.contiguous_format)


def _load_pickle(path: Path) -> dict[str, Tensor]:
    try:  # weights_only: no code of the file is run
        table = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise BadInput(
            f"{path} is truncated or not a PyTorch file that weights_only can map ({first_line(error)}); "
            "download it again, or save the model as safetensors"
        ) from error
    if not isinstance(table, dict):
        raise BadInput(f"{path} holds a {type(table).__name__}, not tensors by name; save the model as safetensors")
    return table


def download(model: str) -> Path:
    """Download the files of a hub model that qsvd reads; return the snapshot folder, whose name is the commit.

    Raises:
        BadInput: there is no such model, or the hub cannot be reached and the cache does not have it.
    """
    folder = _snapshot(model, SMALL_FILES, revision=None)
    for weights in (SAFE, PICKLED):
        index = folder / f"{weights}.index.json"
        shards = sorted(set(_read_weight_map(index).values())) if index.is_file() else []
        _snapshot(model, [weights, *shards], revision=folder.name)
        if shards or (folder / weights).is_file():
            break
    return folder


def small_files(model: str) -> Path:
    """Return the folder with config.json and the tokenizer of a 16-bit model; of a Hub model no weight is downloaded.

    Raises:
        BadInput: there is no such model, or the hub cannot be reached.
    """
    path = Path(model).expanduser()
    if not path.exists():
        return _snapshot(model, SMALL_FILES, revision=None)
    return path if path.is_dir() else path.parent


def download_config(model: str) -> Path:
    """Download only the config.json of a hub model.

    Raises:
        BadInput: there is no such model, it has no config.json, or the hub cannot be reached.
    """
    path = _snapshot(model, ["config.json"], revision=None) / "config.json"
    if not path.is_file():
        raise BadInput(f"{model!r} on the hub has no config.json: it is not a transformers model")
    return path


def _read_weight_map(index: Path) -> dict[str, str]:
    """Return the shard of every tensor, from model.safetensors.index.json or pytorch_model.bin.index.json."""
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise BadInput(f"{index} has no weight_map from tensor names to files; download it again")
    return weight_map


def _snapshot(model: str, patterns: Sequence[str], revision: str | None) -> Path:
    from huggingface_hub import errors, snapshot_download

    try:
        folder = snapshot_download(model, revision=revision, allow_patterns=list(patterns), ignore_patterns=["*/*"])
        if patterns == SMALL_FILES:
            snapshot_download(model, revision=Path(folder).name, allow_patterns=[f"{NAMED_TEMPLATES}/*.jinja"])
    except errors.GatedRepoError as error:
        raise BadInput(f"{model!r} on the hub is gated: accept its terms there, then run `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        raise BadInput(f"no folder {model!r} here, and no such model on the hub (or it is private)") from error
    except (OSError, ValueError, errors.EntryNotFoundError, errors.RevisionResolutionError, errors.HTTPError) as error:
        raise BadInput(
            f"no folder {model!r} here, and the hub cannot be reached for a model of that name (offline?): "
            f"{first_line(error)}"
        ) from error
    return Path(folder)


@dataclass(frozen=True)
class Checkpoint:
    """An open 16-bit model; only headers are in memory."""

    name: str  # a folder or a hub id, as given
    folder: Path | None  # None if the tensors are in no files
    revision: str | None  # the hub's commit; None for a folder
    config: "PreTrainedConfig" = field(repr=False)
    config_json: dict[str, Any] = field(repr=False)  # config.json as it is in the file, but for what is decoded
    tensors: Mapping[str, Entry] = field(repr=False)
    other_files: tuple[Path, ...]  # tokenizer, generation and chat template files, to copy to the output
    fingerprint: str  # SHA-256 of config.json and of every weight file's header, size and a sample of its bytes
    stamps: Mapping[str, Stamp] = field(default_factory=dict, repr=False)  # of these files

    def read(self, name: str) -> Tensor:
        """Read a tensor into its own CPU memory, in the dtype and shape of its entry."""
        return self.read_part(Source(name))

    def read_weight(self, spec: WeightSpec) -> Tensor:
        """Read a weight [O, I]: the rows of all its sources, one after another, in their dtype."""
        parts = [self.read_part(source) for source in spec.read_from]
        weight_OI = parts[0] if len(parts) == 1 else torch.cat(parts)
        assert weight_OI.shape == spec.shape, f"{spec.name}: its sources make {list(weight_OI.shape)}"
        return weight_OI

    def dtype_of(self, spec: WeightSpec) -> torch.dtype:
        """Return the dtype that a weight is stored in."""
        return TORCH_DTYPES[self.tensors[spec.read_from[0].tensor].dtype]

    def read_part(self, part: Source) -> Tensor:
        """Read a part of a tensor; nothing else of the tensor comes into memory."""
        entry = self.tensors[part.tensor]
        if isinstance(entry, PickleEntry):
            tensor = _read_pickled(entry, part)
        elif isinstance(entry, CodedEntry):
            tensor = entry.read(part.index, part.rows)
        else:
            assert isinstance(entry, TensorEntry), "a checkpoint of other entries has its own read_part"
            tensor = read_tensor(entry.part(part.index, part.rows))
        return tensor.T.contiguous() if part.is_transposed else tensor


def open_checkpoint(model: str) -> Checkpoint:
    """Open a local folder, without the network, or else a model of the hub.

    Args:
        model: A folder with config.json and model.safetensors, its index and shards, or the same as pytorch_model.bin;
            or a hub id, "owner/name".

    Raises:
        BadInput: there is no such folder or id; config.json or the weights are missing, damaged or of an unknown
            format.
    """
    local = checkpoint_folder(model)
    folder = download(model) if local is None else local
    check_checkpoint(folder)
    config_json, config = read_object(folder / "config.json"), read_config(folder)
    tensors, seen = _read_tensors(folder)
    if is_published(quantization := config_json.get("quantization_config")):
        tensors = decoded(tensors, quantization)
        del config_json["quantization_config"]
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(seen):
        digest.update(f"\n{file} {(folder / file).stat().st_size}\n".encode() + seen[file])
    return Checkpoint(
        name=model,
        folder=folder,
        revision=folder.name if local is None else None,
        config=config,
        config_json=config_json,
        tensors=tensors,
        other_files=other_files(folder),
        fingerprint=digest.hexdigest(),
        stamps={file: stamp_of((folder / file).stat()) for file in ("config.json", *sorted(seen))},
    )


def read_config(path: Path) -> "PreTrainedConfig":
    """Let transformers read a config.json, given as the file itself or as its folder.

    It has no quantization_config if the model is one that is decoded while it is read.

    Raises:
        BadInput: transformers refuses it, or a number in it is absurd; the sentence says why.
    """
    config = read_config_json(path)
    if is_published(getattr(config, "quantization_config", None)):
        delattr(config, "quantization_config")
    return config


def _read_tensors(folder: Path) -> tuple[dict[str, Entry], dict[str, bytes]]:
    """Return every tensor by name, and for every weight file the bytes that describe its tensors."""
    for weights in (SAFE, PICKLED):
        index = folder / f"{weights}.index.json"
        if (folder / weights).is_file():
            return _read_files(folder, [weights])
        if index.is_file():
            return _read_indexed(folder, index)
    found = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pt", ".h5"))
    raise BadInput(
        f"no weights in {folder}: neither {SAFE} nor {PICKLED} nor an index of either is there"
        + (f", only {listing(found)}" if found else "")
    )


def _read_indexed(folder: Path, index: Path) -> tuple[dict[str, Entry], dict[str, bytes]]:
    weight_map = _read_weight_map(index)
    files = sorted(set(weight_map.values()))
    absent = [file for file in files if not (folder / file).is_file()]
    if absent:
        raise BadInput(f"{len(absent)} of {len(files)} shards of {folder} are missing: {listing(absent)}")
    tensors, seen = _read_files(folder, files)
    lacking = [f"{name} ({file})" for name, file in weight_map.items() if name not in tensors]
    if lacking:
        raise BadInput(f"{index} promises {len(lacking)} tensors that its shards lack: {listing(lacking)}")
    return tensors, seen


def _read_files(folder: Path, files: Iterable[str]) -> tuple[dict[str, Entry], dict[str, bytes]]:
    """Return the tensors of all files, and report all damaged files in one error."""
    tensors: dict[str, Entry] = {}
    seen: dict[str, bytes] = {}
    errors = []
    for file in files:
        path = folder / file
        try:
            if path.suffix == ".bin":
                found = _read_pickle_header(path)
                described = json.dumps([(name, entry.dtype, entry.shape) for name, entry in found.items()]).encode()
            else:
                header = read_header(path)
                found, described = header.tensors, header.raw
            seen[file] = described + _sample(path)
        except ValueError as error:
            errors.append(str(error))
            continue
        twice = [name for name in found if name in tensors]
        if twice:
            errors.append(f"{path} repeats tensors of another shard: {listing(twice)}")
        tensors.update(found)
    if errors:
        raise BadInput("; ".join(errors[:5]) + (f"; and {len(errors) - 5} more" if len(errors) > 5 else ""))
    return tensors, seen


def _sample(path: Path) -> bytes:
    """Return a few kilobytes from places all over a file: two models of the same shapes differ there."""
    size = path.stat().st_size
    samples = []
    with path.open("rb") as file:
        for number in range(SAMPLES):
            file.seek(number * max(size - SAMPLE_BYTES, 0) // (SAMPLES - 1))
            samples.append(file.read(SAMPLE_BYTES))
    return b"".join(samples)


def other_files(folder: Path) -> tuple[Path, ...]:
    """Return the small files to copy to the output: tokenizer, chat template, generation settings, licence."""

    def is_copied(path: Path) -> bool:
        wanted = any(path.match(pattern) for pattern in SMALL_FILES)
        refused = any(path.match(pattern) for pattern in NOT_COPIED)
        return path.is_file() and wanted and not refused and path.stat().st_size <= LARGEST_COPY

    files = [*folder.iterdir(), *(folder / NAMED_TEMPLATES).glob("*.jinja")]
    return tuple(sorted(path for path in files if is_copied(path)))


def place_of(file: Path) -> str:
    """Return where a file of `other_files` is in its folder."""
    return f"{NAMED_TEMPLATES}/{file.name}" if file.parent.name == NAMED_TEMPLATES else file.name


def copy_files(files: Iterable[Path], folder: Path) -> None:
    """Copy files, as `other_files` returns them, to the same places in another folder."""
    for file in files:
        place = folder / place_of(file)
        place.parent.mkdir(exist_ok=True)
        with whole_file(place) as opened:
            opened.write(file.read_bytes())
