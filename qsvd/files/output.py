"""The folder of a quantized model, written weight by weight, so that a killed run can be continued (docs/format.md).

Every finished weight is stored in OUT/unfinished as two files: NNNNN.residual, and then NNNNN.factors, whose metadata
hold the record of the weight. Each file appears by rename when it is complete. When all weights of a shard are
finished, the shard is written from their residual files, which are then removed. `unfinished` is removed last of all.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from qsvd.files.layout import digest
from qsvd.files.safetensors import DTYPE_NAMES, NewTensor, TensorEntry, read_header, write_stream
from qsvd.files.workspace import MANIFEST, Workspace

PYTORCH = {"format": "pt"}


class OutputFolder(Workspace):
    """OUT of one run of `qsvd quantize`."""

    record = MANIFEST
    command = "qsvd quantize"

    def is_done(self, index: int) -> bool:
        """Whether weight number `index` is finished."""
        return self._factors(index).is_file()

    def save(self, index: int, residual: Mapping[str, Tensor], factors: Mapping[str, Tensor], record: object) -> None:
        """Keep one finished weight; `record` is JSON-able and is returned by `weight_record`."""
        write_stream(self._residual(index), in_memory(residual), PYTORCH)
        self.save_factors(index, factors, record, digest(residual))

    def save_factors(self, index: int, factors: Mapping[str, Tensor], record: object, residual_sha256: str) -> None:
        """Keep one weight whose residual goes straight into its shard; else as `save`."""
        metadata = PYTORCH | {"record": json.dumps(record), "residual_sha256": residual_sha256}
        write_stream(self._factors(index), in_memory(factors), metadata)

    def weight_record(self, index: int) -> Any:
        """What `save` was given for this weight."""
        return json.loads(read_header(self._factors(index)).metadata["record"])

    def residual_sha256(self, index: int) -> str:
        """The digest of the weight's residual tensors."""
        return read_header(self._factors(index)).metadata["residual_sha256"]

    def write_shard(self, file: str, indices: Sequence[int], copied: Sequence[NewTensor]) -> None:
        """Join finished residuals and tensors of the source into one shard, then drop the residuals' own files."""
        parts = [part for index in indices for part in _in_file(self._residual(index))]
        write_stream(self.folder / file, [*parts, *copied], PYTORCH)
        for index in indices:
            self._residual(index).unlink()

    def write_adapter(self, file: str, indices: Sequence[int], metadata: Mapping[str, str]) -> None:
        """Join the factors of all weights into one file."""
        (self.folder / file).parent.mkdir(exist_ok=True)
        parts = [part for index in indices for part in _in_file(self._factors(index))]
        write_stream(self.folder / file, parts, PYTORCH | dict(metadata))

    def _residual(self, index: int) -> Path:
        return self.unfinished / f"{index:05d}.residual"

    def _factors(self, index: int) -> Path:
        return self.unfinished / f"{index:05d}.factors"


def in_memory(tensors: Mapping[str, Tensor]) -> list[NewTensor]:
    """Tensors to write as they are."""
    return [NewTensor(name, DTYPE_NAMES[t.dtype], tuple(t.shape), t) for name, t in tensors.items()]


def _in_file(path: Path) -> Iterator[NewTensor]:
    for entry in read_header(path).tensors.values():
        yield from_entry(entry)


def from_entry(entry: TensorEntry) -> NewTensor:
    """A tensor to copy from the file where it lies."""
    return NewTensor(entry.name, entry.dtype, entry.shape, entry)
