"""Which tensor goes into which output file, and how many bytes everything will take; decided before any work."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qsvd.files.source import Checkpoint
from qsvd.plan.allocation import Allocation, residual_bytes
from qsvd.plan.weights import WeightSpec

HEADER_BYTES = 150  # of the JSON of one tensor in a header, at most
TENSORS_PER_WEIGHT = 6


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

    @property
    def disk(self) -> int:
        """Most bytes on disk at any moment: all output, with the factors and one shard there twice."""
        return self.residual + self.copied + 2 * self.factors + self.largest_shard


def plan_shards(
    checkpoint: Checkpoint, weights: Sequence[WeightSpec], allocation: Allocation, most_bytes: int
) -> list[Shard]:
    """Fill files in the order of the source, each up to `most_bytes`; a tensor larger than that has its own."""
    numbers: dict[str, list[int]] = {}  # of the weights, by the tensor that they begin in
    for number, spec in enumerate(weights):
        numbers.setdefault(spec.read_from[0].tensor, []).append(number)
    split = {source.tensor for spec in weights for source in spec.read_from}
    groups: list[list[int | str]] = [[]]
    sizes = [0]
    for name, entry in checkpoint.tensors.items():
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


def sizes_of(
    checkpoint: Checkpoint,
    weights: Sequence[WeightSpec],
    shards: Sequence[Shard],
    allocation: Allocation,
    dtype: torch.dtype,
) -> Sizes:
    """Count the bytes of a run."""
    copied = sum(checkpoint.tensors[name].num_bytes for shard in shards for name in shard.copied)
    numbers = sum(allocation.choices[spec.module].rank * sum(spec.shape) for spec in weights)
    return Sizes(
        source=sum(math.prod(spec.shape) * checkpoint.dtype_of(spec).itemsize for spec in weights),
        residual=sum(shard.num_bytes for shard in shards) - copied,
        copied=copied,
        factors=numbers * dtype.itemsize + 4 * HEADER_BYTES * len(weights),
        largest_shard=max(shard.num_bytes for shard in shards),
    )
