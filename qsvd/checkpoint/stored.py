"""Where the parts of a stored residual are, whichever layout the files have."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from qsvd.numerics.codec import Codec, PackedBlocks, from_bytes

Part = TypeVar("Part")


@dataclass(frozen=True)
class StoredResidual(Generic[Part]):
    """The tensors of a residual, or where they lie, by the names of PackedBlocks.tensors; and what they make up."""

    parts: dict[str, Part | bytes]
    shape: tuple[int, int]
    codec: Codec
    nested_block: int | None

    def read(self, read: Callable[[Part], Tensor]) -> PackedBlocks:
        """The residual; `read` gives the tensor of a part."""
        parts = {
            name: torch.frombuffer(bytearray(part), dtype=torch.uint8)
            if isinstance(part, bytes)
            else read(part).reshape(-1).view(torch.uint8)
            for name, part in self.parts.items()
        }
        return from_bytes(parts, self.shape, self.codec, self.nested_block)
