"""A result of `qsvd quantize`, read back: residual and factors of each weight, and the dense matrix they stand for."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qsvd.checkpoint.layout import (
    ADAPTER_PREFIX,
    QUANT_STATE,
    RESIDUAL_PARTS,
    StoredResidual,
    residual_from_tensors,
    stored_residual,
)
from qsvd.checkpoint.tensor_file import TensorEntry, map_tensor, read_header, read_tensor
from qsvd.checkpoint.write import MANIFEST
from qsvd.numerics.codec import PackedBlocks
from qsvd.plan.listing import listing


@dataclass(frozen=True)
class SplitFolder:
    """OUT, open for reading; tensors are read when asked for.

    weights maps each split weight's tensor name to its entry in the manifest: module, shape, role, rank, file.
    tensors are those of all shards and of the adapter.
    """

    folder: Path
    manifest: dict[str, Any]
    tensors: dict[str, TensorEntry]

    @property
    def weights(self) -> dict[str, dict[str, Any]]:
        return self.manifest["weights"]

    @property
    def fingerprint(self) -> str:
        """Of all residuals."""
        return self.manifest["fingerprint"]

    def residual(self, name: str, *, mapped: bool = False) -> PackedBlocks:
        """Q of one weight; mapped: its bytes stay in the file until they are looked at."""
        read = map_tensor if mapped else read_tensor
        return residual_from_tensors(name, {key: read(entry) for key, entry in self._entries(name).items()})

    def stored(self, name: str) -> StoredResidual[TensorEntry]:
        """Where the parts of Q of one weight lie."""
        entries = self._entries(name)
        state = entries.get(f"{name}.{QUANT_STATE}")
        return stored_residual(name, entries, b"" if state is None else read_tensor(state).numpy().tobytes())

    def _entries(self, name: str) -> dict[str, TensorEntry]:
        keys = (name, *(f"{name}.{part}" for part in RESIDUAL_PARTS))
        return {key: self.tensors[key] for key in keys if key in self.tensors}

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """B [O, R] and A [R, I] of one weight, or None at rank 0."""
        if self.weights[name]["rank"] == 0:
            return None
        prefix = f"{ADAPTER_PREFIX}{self.weights[name]['module']}"
        up_OR, down_RI = (read_tensor(self.tensors[f"{prefix}.lora_{letter}.weight"]) for letter in "BA")
        return up_OR, down_RI

    def dense(self, name: str) -> Tensor:
        """Q + B A, float32 [O, I]."""
        dense_OI, factors = self.residual(name).decode(), self.factors(name)
        return dense_OI if factors is None else dense_OI.addmm_(factors[0].float(), factors[1].float())


def open_split(folder: Path) -> SplitFolder:
    """Open a result.

    Raises:
        ValueError: the folder is no result of qsvd quantize, or adapter and residual do not belong together.
    """
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder} is no result of qsvd quantize: it has no {MANIFEST}")
    manifest = json.loads((folder / MANIFEST).read_text())
    tensors: dict[str, TensorEntry] = {}
    shards = _shards(folder, manifest)
    absent = [file for file in shards if not (folder / file).is_file()]
    if absent:
        raise ValueError(
            f"{len(absent)} of {len(shards)} shards of {folder} are missing: {listing(absent)}; copy them again"
        )
    for file in shards:
        tensors |= read_header(folder / file).tensors
    adapter = folder / "adapter" / "adapter_model.safetensors"
    if adapter.is_file():
        header = read_header(adapter)
        if header.metadata.get("qsvd_base_fingerprint") != manifest["fingerprint"]:
            raise ValueError(
                f"{adapter} belongs to another residual than {folder}: its fingerprint differs; use the adapter that "
                "was made with this folder"
            )
        tensors |= header.tensors
    return SplitFolder(folder, manifest, tensors)


def _shards(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """The weight files, those without a split weight too."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return sorted({*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    return sorted({weight["file"] for weight in manifest["weights"].values()})
