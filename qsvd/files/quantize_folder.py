"""The folder of a quantized model, written weight by weight, so that a killed run can be continued (docs/format.md).

Which tensor goes into which file, and how many bytes everything will take, is decided before any work.

Every finished weight is stored in OUT/unfinished as two files: NNNNN.residual, and then NNNNN.factors, whose metadata
hold the record of the weight. Each file appears by rename when it is complete. When all weights of a shard are
finished, the shard is written from their residual files, which are then removed. `unfinished` is removed last of all.
"""

import json
import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qsvd.decompose.alternate import STACK
from qsvd.errors import BadInput, Damaged
from qsvd.files.atomic import Stamp, read_record, write_record
from qsvd.files.layout import digest
from qsvd.files.quantized.manifest import DIGESTS_SINCE
from qsvd.files.safetensors import NewTensor, TensorEntry, new_tensors, read_header, write_stream
from qsvd.files.source import Checkpoint
from qsvd.files.workspace import MANIFEST, Workspace
from qsvd.numerics.names import spelling
from qsvd.plan.allocation import Allocation, residual_bytes
from qsvd.plan.weights import WeightSpec

PYTORCH = {"format": "pt"}
HEADER_BYTES = 250  # of the JSON of one tensor in a header, with its digest, at most
TENSORS_PER_WEIGHT = 6
SOURCE = "source.json"  # in unfinished/: size and time of the files of the 16-bit model


@dataclass(frozen=True)
class Shard:
    """One output file: residuals of the weights with these numbers, and copies of these tensors of the source."""

    file: str
    weights: tuple[int, ...]
    copied: tuple[str, ...]
    num_bytes: int


@dataclass(frozen=True)
class Sizes:
    """Bytes that a run reads and writes, by what they are; upper bounds within a few hundred bytes a tensor."""

    source: int
    residual: int
    copied: int
    factors: int
    largest_shard: int
    largest_copy: int  # of the tensors that are in memory while they are copied: those of safetensors are not

    @property
    def disk(self) -> int:
        """Most bytes on disk at any moment: all output, with the factors and one shard there twice."""
        return self.residual + self.copied + 2 * self.factors + self.largest_shard


def plan_shards(
    checkpoint: Checkpoint,
    weights: Sequence[WeightSpec],
    allocation: Allocation,
    most_bytes: int,
    dropped: Collection[str] = (),
) -> list[Shard]:
    """Fill files in the order of the source, each up to `most_bytes`; a tensor larger than that has its own.

    Args:
        dropped: Tensors of the source that are not copied.
    """
    numbers: dict[str, list[int]] = {}  # of the weights, by the tensor that they begin in
    for number, spec in enumerate(weights):
        numbers.setdefault(spec.read_from[0].tensor, []).append(number)
    split = {source.tensor for spec in weights for source in spec.read_from}
    groups: list[list[int | str]] = [[]]
    sizes = [0]
    for name, entry in checkpoint.tensors.items():
        if name in dropped:
            continue
        parts: list[int | str] = [*numbers.get(name, ())] if name in split else [name]
        for part in parts:
            size = HEADER_BYTES + entry.num_bytes
            if isinstance(part, int):
                codec = allocation.choices[weights[part].module].codec
                size = TENSORS_PER_WEIGHT * HEADER_BYTES + residual_bytes(codec, weights[part].shape)
            if groups[-1] and sizes[-1] + size > most_bytes:
                groups.append([])
                sizes.append(0)
            groups[-1].append(part)
            sizes[-1] += size
    return [
        Shard(
            "model.safetensors" if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors",
            tuple(part for part in group if isinstance(part, int)),
            tuple(part for part in group if isinstance(part, str)),
            size,
        )
        for number, (group, size) in enumerate(zip(groups, sizes, strict=True), start=1)
    ]


def plan_stacks(
    checkpoint: Checkpoint, weights: Sequence[WeightSpec], allocation: Allocation, shard: Shard, device: str
) -> list[tuple[int, ...]]:
    """Return the weights of a shard in the stacks that they are split in: alike in role, shape, dtype, codec and rank.

    Stacks depend on these and on "cpu" or "cuda" alone, so that a run that is continued makes the same ones.
    """
    alike: dict[tuple[object, ...], list[int]] = {}
    for number in shard.weights:
        spec, choice = weights[number], allocation.choices[weights[number].module]
        dtype = checkpoint.dtype_of(spec)
        alike.setdefault((spec.role, spec.shape, dtype, spelling(choice.codec), choice.rank), []).append(number)
    stacks = []
    for group in alike.values():
        size = max(1, STACK[device] // math.prod(weights[group[0]].shape))
        stacks += [tuple(group[start : start + size]) for start in range(0, len(group), size)]
    return sorted(stacks, key=lambda stack: shard.weights.index(stack[0]))  # about the order of the source


def sizes_of(
    checkpoint: Checkpoint,
    weights: Sequence[WeightSpec],
    shards: Sequence[Shard],
    allocation: Allocation,
    dtype: torch.dtype,
) -> Sizes:
    """Count the bytes of a run."""
    copied = [checkpoint.tensors[name] for shard in shards for name in shard.copied]
    copied_bytes = sum(entry.num_bytes for entry in copied)
    numbers = sum(allocation.choices[spec.module].rank * sum(spec.shape) for spec in weights)
    return Sizes(
        source=sum(_stored_bytes(checkpoint, spec) for spec in weights),
        residual=sum(shard.num_bytes for shard in shards) - copied_bytes,
        copied=copied_bytes,
        factors=numbers * dtype.itemsize + 4 * HEADER_BYTES * len(weights),
        largest_shard=max(shard.num_bytes for shard in shards),
        largest_copy=max((entry.num_bytes for entry in copied if not isinstance(entry, TensorEntry)), default=0),
    )


def _stored_bytes(checkpoint: Checkpoint, spec: WeightSpec) -> int:
    entry = checkpoint.tensors[spec.read_from[0].tensor]
    return math.prod(spec.shape) * entry.stored_bytes // math.prod(entry.shape)


class OutputFolder(Workspace):
    """The folder that one run of `qsvd quantize` writes."""

    record = MANIFEST
    command = "qsvd quantize"
    parts = r"lock\.\d+|source\.json|allocation\.txt(\.costs\.jsonl(\.lock)?)?"
    sealed_since = DIGESTS_SINCE

    def is_done(self, index: int) -> bool:
        """Return whether weight number `index` is finished."""
        return self._factors(index).is_file()

    def save(
        self,
        index: int,
        residual: Mapping[str, Tensor],
        factors: Mapping[str, Tensor],
        record: object,
        source_digest: str,
    ) -> None:
        """Write a finished weight.

        Args:
            record: JSON-able; is returned by `weight_record`.
            source_digest: Of the weight as it was read; is returned by `source_digest`.
        """
        write_stream(self._residual(index), new_tensors(residual), PYTORCH)
        self.save_factors(index, factors, record, digest(residual), source_digest)

    def save_factors(
        self, index: int, factors: Mapping[str, Tensor], record: object, residual_sha256: str, source_digest: str = ""
    ) -> None:
        """Write a weight as `save` does, but without its residual, which the caller writes to the shard."""
        metadata = {"record": json.dumps(record), "residual_sha256": residual_sha256, "source_digest": source_digest}
        write_stream(self._factors(index), new_tensors(factors), PYTORCH | metadata)

    def weight_record(self, index: int) -> Any:
        """Return the record that `save` was given; raise what `write_shard` raises."""
        with self._again(index):
            return json.loads(read_header(self._factors(index)).metadata["record"])

    def residual_sha256(self, index: int) -> str:
        """Return the digest of the residual tensors of a weight; raise what `write_shard` raises."""
        with self._again(index):
            return read_header(self._factors(index)).metadata["residual_sha256"]

    def source_digest(self, index: int) -> str:
        """Return the digest of a weight as it was read; "" if an older version or nobody read it."""
        with self._again(index):
            return read_header(self._factors(index)).metadata.get("source_digest", "")

    def entries(self, index: int, shard: str) -> dict[str, TensorEntry]:
        """Return the tensors of a finished weight, whose residual may be in its shard; raise as `write_shard` does."""
        with self._again(index):
            kept = self._residual(index)
            residual = read_header(kept if kept.is_file() else self.folder / shard).tensors
            return {**residual, **read_header(self._factors(index)).tensors}

    @property
    def source_files(self) -> dict[str, Any]:
        """What `keep_source_files` got; empty if it was not called."""
        path = self.unfinished / SOURCE
        return read_record(path) if path.is_file() else {}

    def keep_source_files(self, stamps: Mapping[str, Stamp], copied: Mapping[str, str]) -> None:
        """Keep what is known of the files of the 16-bit model for a run that continues.

        Args:
            stamps: Of the files with weights.
            copied: Digests of the files that are copied at the end, by name.
        """
        write_record(self.unfinished / SOURCE, {"files": dict(stamps), "copied": dict(copied)})

    def write_shard(self, file: str, indices: Sequence[int], copied: Sequence[NewTensor]) -> None:
        """Write finished residuals and tensors of the 16-bit model to a shard, then remove the residual files.

        Raises:
            Damaged: an unfinished file differs from its digest. It is removed, so that its weight is split again.
        """
        with self._again(*indices):
            write_stream(self.folder / file, [*self._parts(indices, self._residual), *copied], PYTORCH)
        for index in indices:
            self._residual(index).unlink()

    def write_adapter(self, file: str, indices: Sequence[int], metadata: Mapping[str, str]) -> None:
        """Write the components of all weights to one file; raise what `write_shard` raises."""
        with self._again(*indices):
            write_stream(self.folder / file, self._parts(indices, self._factors), PYTORCH | dict(metadata))

    def forget(self, indices: Iterable[int]) -> None:
        """Remove what is kept of weights, so that they are split again."""
        for index in indices:
            self._factors(index).unlink(missing_ok=True)
            self._residual(index).unlink(missing_ok=True)

    def _parts(self, indices: Sequence[int], place: Callable[[int], Path]) -> list[NewTensor]:
        parts = []
        for index in indices:
            with self._again(index):
                parts += new_tensors(read_header(place(index)).tensors)
        return parts

    @contextmanager
    def _again(self, *indices: int) -> Iterator[None]:
        """Remove a damaged file of a weight, and say that the weight is split again."""
        try:
            yield
        except BadInput as error:
            for index in indices:
                if any(f"{path} " in str(error) for path in (self._factors(index), self._residual(index))):
                    self.forget([index])
                    again = "it is removed, and the same command splits this weight again"
                    raise Damaged(f"{str(error).partition(';')[0]}; {again}") from error
            raise

    def _residual(self, index: int) -> Path:
        return self.unfinished / f"{index:05d}.residual"

    def _factors(self, index: int) -> Path:
        return self.unfinished / f"{index:05d}.factors"


class BackgroundWriter:
    """Saves finished weights, in order, and joins them to shards, while its caller splits the next ones.

    One thread saves, and another one joins a shard when its weights are saved. After an error of a weight, no later
    weight is saved. A `with` block ends when everything is written; a block that fails leaves out the shards that are
    not begun.

    Args:
        most_bytes: Bytes of tensors that wait for the disk. A larger weight waits alone.

    Raises:
        OSError: a file cannot be written; from any call after that, or at the end of the block.
    """

    def __init__(self, folder: OutputFolder, most_bytes: int):
        self.folder = folder
        self._most_bytes = most_bytes
        self._saver, self._joiner = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._saves, self._joins = deque[tuple[Future[None], int]](), deque[Future[None]]()
        self._last: Future[None] | None = None  # the last weight

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._joiner.shutdown(wait=False, cancel_futures=kind is not None)
        self._saver.shutdown()
        self._joiner.shutdown()
        self._joins = deque(join for join in self._joins if not join.cancelled())
        self.wait()

    def save(
        self,
        index: int,
        residual: Mapping[str, Tensor],
        factors: Mapping[str, Tensor],
        record: object,
        source_digest: str,
    ) -> None:
        """Save a weight as OutputFolder.save does, later; return when no more than `most_bytes` wait."""
        num_bytes = sum(tensor.nbytes for tensor in (*residual.values(), *factors.values()))
        while self._joins and self._joins[0].done():
            self._joins.popleft().result()
        while self._saves and (
            self._saves[0][0].done() or num_bytes + sum(waiting for _, waiting in self._saves) > self._most_bytes
        ):
            self._saves.popleft()[0].result()
        arguments = (index, residual, factors, record, source_digest)
        self._last = self._saver.submit(_after, self._last, self.folder.save, *arguments)
        self._saves.append((self._last, num_bytes))

    def write_shard(self, file: str, indices: Sequence[int], copied: Sequence[NewTensor]) -> None:
        """Write a shard as OutputFolder.write_shard does, after all weights that were given until now."""
        self._joins.append(self._joiner.submit(_after, self._last, self.folder.write_shard, file, indices, copied))

    def wait(self) -> None:
        """Return when everything is written."""
        while self._saves:
            self._saves.popleft()[0].result()
        while self._joins:
            self._joins.popleft().result()


def _after(before: Future[None] | None, write: Callable[..., None], *arguments: Any) -> None:
    """Write after another job; raise its error if it failed."""
    if before is not None:
        before.result()
    write(*arguments)
