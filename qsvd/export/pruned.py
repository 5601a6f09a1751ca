"""A pruned model's record, and a change of its weights as one of the model that it was made from (LoRAM).

Rows of B and columns of A at removed channels are zeros (LoRAM, arXiv:2502.13533, recovery): the change of every
weight is that of the pruned model on kept channels, and nothing elsewhere.

Shape suffixes: O, I = out and in features of the original weight, P, Q = of the pruned one, K = rank.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from qsvd.errors import BadInput, listing
from qsvd.files.atomic import read_record, record_text, write_text
from qsvd.files.source import PRUNED_RECORD
from qsvd.files.split_folder import SplitFolder
from qsvd.records import stored

FORMAT = 1


@dataclass(frozen=True)
class CutLayer:
    """A linear layer without some channels of its MLP.

    Args:
        block: The path of its block, of which the kept channels are listed.
        axis: 0 if its rows are channels (gate and up), 1 if its columns are (down).
        repeats: 2 if its rows are those of gate, then those of up.
    """

    block: str
    axis: Literal[0, 1]
    repeats: Literal[1, 2]


@dataclass(frozen=True)
class PrunedRecord:
    """What `qsvd prune` removed from a model: qsvd_pruned.json beside it, and in its quantized model.

    Args:
        original: The 16-bit model, as it was named.
        fingerprint: Its fingerprint: config.json, headers, sizes and samples of its weight files.
        option: The width of its MLPs in config.json, "intermediate_size".
        channels: That width in the original.
        kept: The numbers of the channels that are left, ascending, by the path of the block.
        layers: The layers that were cut, by path.
    """

    format: int
    original: str
    fingerprint: str
    option: str
    channels: int
    kept: Mapping[str, tuple[int, ...]]
    layers: Mapping[str, CutLayer]

    def place(self, module: str, shape: tuple[int, int]) -> "Place":
        """Return where a weight of the pruned model is in the original.

        Args:
            shape: [P, Q] of the pruned weight.
        """
        cut = self.layers.get(module)
        if cut is None:
            return Place(shape)
        kept = torch.tensor(self.kept[cut.block])
        found = torch.cat([kept + part * self.channels for part in range(cut.repeats)])
        sizes = [*shape]
        sizes[cut.axis] = cut.repeats * self.channels
        rows, columns = (found, None) if cut.axis == 0 else (None, found)
        return Place((sizes[0], sizes[1]), rows, columns)


@dataclass(frozen=True)
class Place:
    """Rows and columns of an original weight.

    Args:
        shape: [O, I].
        rows, columns: Numbers of those that the pruned weight has, int64; None is all of them.
    """

    shape: tuple[int, int]
    rows: Tensor | None = None
    columns: Tensor | None = None

    def up(self, up_PK: Tensor) -> Tensor:
        """Return B [O, K], with zeros at removed rows."""
        return up_PK if self.rows is None else _spread(up_PK, 0, self.rows, self.shape[0])

    def down(self, down_KQ: Tensor) -> Tensor:
        """Return A [K, I], with zeros at removed columns."""
        return down_KQ if self.columns is None else _spread(down_KQ, 1, self.columns, self.shape[1])

    def change(self, change_PQ: Tensor) -> Tensor:
        """Return the change of the original weight [O, I]."""
        return self.down(self.up(change_PQ))


def _spread(part: Tensor, axis: int, places: Tensor, size: int) -> Tensor:
    shape = [*part.shape]
    shape[axis] = size
    return part.new_zeros(shape).index_copy_(axis, places, part)


def write_pruned(folder: Path, record: PrunedRecord) -> None:
    """Write the record, in one line: the channels of a large model are a million numbers."""
    write_text(folder / PRUNED_RECORD, record_text(asdict(record), indent=None))


def read_pruned(folder: Path) -> PrunedRecord | None:
    """Return the record of a pruned model, or of a quantized one that was made from it; None if there is none.

    Raises:
        BadInput: it is of another version.
        Damaged: it differs from its digest.
    """
    path = folder / PRUNED_RECORD
    if not path.is_file():
        return None
    record = stored(PrunedRecord, read_record(path), f"{path} is damaged")
    if record.format != FORMAT:
        raise BadInput(f"{path} has format {record.format}; this version of qsvd reads {FORMAT}: install a newer one")
    return record


def check_fits(record: PrunedRecord, split: SplitFolder) -> None:
    """Refuse a record whose channels are not those of the weights of a quantized model."""
    wrong = [
        f"{weight['module']} has {weight['shape'][cut.axis]} instead of {cut.repeats * len(record.kept[cut.block])}"
        for weight in split.weights.values()
        if (cut := record.layers.get(weight["module"])) is not None
        if weight["shape"][cut.axis] != cut.repeats * len(record.kept[cut.block])
    ]
    if wrong:
        raise BadInput(
            f"{split.folder / PRUNED_RECORD} is of another pruned model: {listing(wrong)} channels; quantize the "
            "pruned model again"
        )
