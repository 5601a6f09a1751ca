"""A quantized model, open for reading: residual and components of each weight, and the matrix that they make."""

from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import Tensor

from qsvd.errors import BadInput, Damaged, listing
from qsvd.files.atomic import read_object
from qsvd.files.layout import (
    ADAPTER_PREFIX,
    ADAPTER_TENSORS,
    PARTS,
    QUANT_STATE,
    RESIDUAL_PARTS,
    UNREAD,
    StoredResidual,
    fingerprint,
    part_name,
    stored_packed,
    stored_residual,
)
from qsvd.files.quantized import compressed
from qsvd.files.quantized.manifest import QUANTIZE_AGAIN, read_manifest
from qsvd.files.readers import check_contents
from qsvd.files.safetensors import TORCH_DTYPES, TensorEntry, read_header, read_tensor
from qsvd.files.workspace import MANIFEST
from qsvd.numerics.codec import Codec, PackedBlocks
from qsvd.numerics.int4 import Int4
from qsvd.numerics.names import codec_named
from qsvd.numerics.nf4 import NormalFloat4
from qsvd.numerics.normal_float import NormalFloat

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class SplitFolder:
    """A quantized model. Tensors are read on demand, by `read`."""

    folder: Path
    manifest: dict[str, Any]  # qsvd.json
    tensors: dict[str, TensorEntry]  # of all shards and of the stored components
    read: Callable[[TensorEntry], Tensor] = read_tensor

    @property
    def weights(self) -> dict[str, dict[str, Any]]:
        """Return module, shape, role, codec, rank and file of every weight, by its tensor name."""
        return self.manifest["weights"]

    @property
    def tables(self) -> dict[str, dict[str, Any]]:
        """Return the same of a quantized embedding and head, which have no components."""
        return self.manifest.get("tables", {})

    @cached_property
    def _packed(self) -> dict[str, dict[str, Any]]:
        return self.weights | self.tables

    @cached_property
    def ranks(self) -> dict[str, int]:
        """Return the rank of the components of every weight, by its tensor name."""
        return {name: weight["rank"] for name, weight in self.weights.items()}

    @cached_property
    def module_ranks(self) -> dict[str, int]:
        """Return the same by the path of the layer, but for encoders of images and sound, which stay frozen."""
        return {weight["module"]: weight["rank"] for weight in self.weights.values() if not weight.get("tower")}

    @property
    def fingerprint(self) -> str:
        """Return the digest of all residuals."""
        return self.manifest["fingerprint"]

    def residual(self, name: str) -> PackedBlocks:
        """Read Q of one weight or table."""
        return self.stored(name).read(self.read)

    def unread_residual(self, name: str) -> PackedBlocks:
        """Return Q of one weight without its bytes, on the meta device."""
        return self.stored(name).read(_unread)

    def stored(self, name: str) -> StoredResidual[TensorEntry]:
        """Return the entries of the parts of Q of one weight or table."""
        codec, entries = self.codec(name), {key: self.tensors[key] for key in self.part_names(name)}
        rows, columns = self._packed[name]["shape"]
        if isinstance(codec, Int4):
            found = compressed.stored_compressed(name, entries, (rows, columns), codec)
        elif isinstance(codec, NormalFloat):
            found = stored_packed(name, entries, (rows, columns), codec)
        else:
            state = entries.get(f"{name}.{QUANT_STATE}")
            found = stored_residual(name, entries, b"" if state is None else read_tensor(state).numpy().tobytes())
        sizes = {part: len(e) if isinstance(e, bytes) else e.num_bytes for part, e in found.parts.items()}
        if found.shape != (rows, columns) or sizes != codec.parts(found.shape):
            raise BadInput(
                f"{self.folder / MANIFEST} is damaged: the tensors of {name} are not those of a {rows} x {columns} "
                f"matrix in {codec.name}; {QUANTIZE_AGAIN}"
            )
        return found

    def codec(self, name: str) -> Codec:
        """Return the codec of one residual. Models of version 0.1.0 name none and have one codec for all."""
        if "codec" in self._packed[name]:
            return codec_named(self._packed[name]["codec"])
        return NormalFloat4(double_quant=self.manifest["run"]["double_quant"])

    @cached_property
    def stored_dtype(self) -> torch.dtype:
        """Return the dtype that most of the weights had in the 16-bit model."""
        path = self.folder / "config.json"
        quantization = read_object(path).get("quantization_config")
        found = quantization if isinstance(quantization, dict) else {}
        named = self.manifest.get("dtype") or found.get("dtype") or found.get("bnb_4bit_compute_dtype")
        dtype = getattr(torch, str(named), None)
        if not isinstance(dtype, torch.dtype):
            raise Damaged(f"{path} is damaged: quantization_config has no dtype; {QUANTIZE_AGAIN}")
        return dtype

    @cached_property
    def residual_names(self) -> frozenset[str]:
        """Return the names of all tensors that are part of a residual."""
        return frozenset(part for name in self._packed for part in self.part_names(name))

    def part_names(self, name: str) -> list[str]:
        """Return the names of the tensors of one residual."""
        if isinstance(self.codec(name), Int4):
            keys = compressed.part_names(name)
        elif isinstance(self.codec(name), NormalFloat):
            keys = (name, *(part_name(name, part) for part in PARTS))
        else:
            keys = (name, *(f"{name}.{part}" for part in RESIDUAL_PARTS))
        return [key for key in keys if key in self.tensors]

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Read B [O, R] and A [R, I] of one weight; return None at rank 0."""
        if not (entries := self._factor_entries(name)):
            return None
        up_OR, down_RI = (self.read(entry) for entry in entries)
        return up_OR, down_RI

    def _factor_entries(self, name: str) -> list[TensorEntry]:
        if self._packed[name]["rank"] == 0:
            return []
        prefix = f"{ADAPTER_PREFIX}{self.weights[name]['module']}"
        return [self.tensors[f"{prefix}.lora_{letter}.weight"] for letter in "BA"]

    def entries_of(self, names: Iterable[str], *, paged: Container[str]) -> Iterator[TensorEntry]:
        """Yield what is read of tensors of the 16-bit model, in the order in which it is read.

        Args:
            paged: Weights whose residuals are read later.
        """
        for name in names:
            if name not in self._packed:
                yield self.tensors[name]
                continue
            if name not in paged:
                unread = {name + compressed.SHAPE, *(f"{name}.{part}" for part in UNREAD)}
                yield from (self.tensors[key] for key in self.part_names(name) if key not in unread)
            yield from self._factor_entries(name)

    def dense(self, name: str) -> Tensor:
        """Return Q + B A, float32 [O, I]."""
        dense_OI, factors = self.residual(name).decode(), self.factors(name)
        return dense_OI if factors is None else dense_OI.addmm_(factors[0].float(), factors[1].float())


def _unread(entry: TensorEntry) -> Tensor:
    return torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype], device="meta")


def dense_weight(folder: Path, name: str, weight: dict[str, Any], tensors: dict[str, TensorEntry]) -> Tensor:
    """Return Q + B A of one weight of a model that is not complete yet, float32 [O, I].

    Args:
        weight: What the manifest will say of it.
        tensors: Of the files that hold it.
    """
    return SplitFolder(folder, {"weights": {name: weight}}, compressed.renamed(tensors, [name])).dense(name)


def open_split(folder: Path) -> SplitFolder:
    """Open a quantized model.

    Raises:
        BadInput: the folder is not a quantized model, lacks files, or its components belong to another model.
    """
    manifest = read_manifest(folder)
    packed = manifest["weights"] | manifest.get("tables", {})
    if fingerprint({name: weight["residual_sha256"] for name, weight in packed.items()}) != manifest["fingerprint"]:
        raise Damaged(f"{folder / MANIFEST} is damaged: its fingerprint is not that of its weights; {QUANTIZE_AGAIN}")
    accept = f"give qsvd verify {quote(str(folder))} --accept if you changed them"
    check_contents(folder, manifest.get("files", {}), "qsvd quantize", accept)
    tensors: dict[str, TensorEntry] = {}
    shards = _shards(folder, manifest)
    absent = [file for file in shards if not (folder / file).is_file()]
    if absent:
        raise BadInput(
            f"{len(absent)} of {len(shards)} shards of {folder} are missing: {listing(absent)}; copy them again"
        )
    for file in shards:
        tensors |= read_header(folder / file).tensors
    tensors = compressed.renamed(tensors, packed)
    has_components = (folder / ADAPTER_TENSORS).is_file()
    if has_components or any(weight["rank"] for weight in manifest["weights"].values()):
        adapter = _components(folder)
        header = read_header(adapter)
        if header.metadata.get("qsvd_base_fingerprint") != manifest["fingerprint"]:
            raise BadInput(
                f"{adapter} belongs to another quantized model than {folder}: its fingerprint differs; use the file "
                "that was written with this folder"
            )
        _check_ranks(folder / MANIFEST, manifest["weights"], header.tensors)
        tensors |= header.tensors
    return SplitFolder(folder, manifest, tensors)


def _check_ranks(path: Path, weights: dict[str, dict[str, Any]], stored: dict[str, TensorEntry]) -> None:
    """Refuse weights whose components have another rank than the manifest says, or belong to no weight."""
    needed = {}
    for weight in weights.values():
        prefix, (rows, columns), rank = f"{ADAPTER_PREFIX}{weight['module']}", weight["shape"], weight["rank"]
        if rank:
            needed[f"{prefix}.lora_A.weight"], needed[f"{prefix}.lora_B.weight"] = (rank, columns), (rows, rank)
    found = {name: tuple(entry.shape) for name, entry in stored.items()}
    if wrong := sorted(name for name in {*needed, *found} if needed.get(name) != found.get(name)):
        raise BadInput(
            f"{path} and the file of the components have other shapes for {listing(wrong)}; copy both files again"
        )


def _components(folder: Path) -> Path:
    """Return the file of the components, which format 1 has in adapter/."""
    places = (folder / ADAPTER_TENSORS, folder / "adapter" / ADAPTER_TENSORS)
    found = next((path for path in places if path.is_file()), None)
    if found is None:
        raise BadInput(f"{folder} lacks {ADAPTER_TENSORS}, the components of its weights; copy it again")
    return found


def _shards(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """Return the names of all weight files, also of those without a split weight."""
    index = folder / INDEX
    if index.is_file():
        files = read_object(index, QUANTIZE_AGAIN).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise BadInput(f"{index} is damaged: it has no weight_map; {QUANTIZE_AGAIN}")
        return sorted({*files.values()})
    return sorted({weight["file"] for weight in (manifest["weights"] | manifest.get("tables", {})).values()})
