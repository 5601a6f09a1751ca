"""The folder of a quantized model, written weight by weight, so that a killed run can be continued (docs/format.md).

Every finished weight is stored in OUT/unfinished as two files: NNNNN.residual, and then NNNNN.factors, whose metadata
hold the record of the weight. Each file appears by rename when it is complete. When all weights of a shard are
finished, the shard is written from their residual files, which are then removed. `unfinished` is removed last of all.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from qsvd.files.layout import digest
from qsvd.files.safetensors import NewTensor, new_tensors, read_header, write_stream
from qsvd.files.workspace import MANIFEST, Workspace

PYTORCH = {"format": "pt"}


class OutputFolder(Workspace):
    """The folder that one run of `qsvd quantize` writes."""

    record = MANIFEST
    command = "qsvd quantize"

    def is_done(self, index: int) -> bool:
        """Return whether weight number `index` is finished."""
        return self._factors(index).is_file()

    def save(self, index: int, residual: Mapping[str, Tensor], factors: Mapping[str, Tensor], record: object) -> None:
        """Write a finished weight; `record` is JSON-able and is returned by `weight_record`."""
        write_stream(self._residual(index), new_tensors(residual), PYTORCH)
        self.save_factors(index, factors, record, digest(residual))

    def save_factors(self, index: int, factors: Mapping[str, Tensor], record: object, residual_sha256: str) -> None:
        """Write a weight as `save` does, but without its residual, which the caller writes to the shard."""
        metadata = PYTORCH | {"record": json.dumps(record), "residual_sha256": residual_sha256}
        write_stream(self._factors(index), new_tensors(factors), metadata)

    def weight_record(self, index: int) -> Any:
        """Return the record that `save` was given."""
        return json.loads(read_header(self._factors(index)).metadata["record"])

    def residual_sha256(self, index: int) -> str:
        """Return the digest of the residual tensors of a weight."""
        return read_header(self._factors(index)).metadata["residual_sha256"]

    def write_shard(self, file: str, indices: Sequence[int], copied: Sequence[NewTensor]) -> None:
        """Write finished residuals and tensors of the 16-bit model to a shard, then remove the residual files."""
        parts = [part for index in indices for part in new_tensors(read_header(self._residual(index)).tensors)]
        write_stream(self.folder / file, [*parts, *copied], PYTORCH)
        for index in indices:
            self._residual(index).unlink()

    def write_adapter(self, file: str, indices: Sequence[int], metadata: Mapping[str, str]) -> None:
        """Write the components of all weights to one file."""
        parts = [part for index in indices for part in new_tensors(read_header(self._factors(index)).tensors)]
        write_stream(self.folder / file, parts, PYTORCH | dict(metadata))

    def _residual(self, index: int) -> Path:
        return self.unfinished / f"{index:05d}.residual"

    def _factors(self, index: int) -> Path:
        return self.unfinished / f"{index:05d}.factors"
