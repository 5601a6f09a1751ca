"""The folder of a pruned model: a plain 16-bit checkpoint with narrower MLPs, and the record of what is left.

One tensor at a time is in memory. A killed run continues with the first MLP, or the first shard, that is missing.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor

from qsvd.export.merged import shards_of, write_shards
from qsvd.export.pruned import FORMAT, PrunedRecord, write_pruned
from qsvd.export.trained import ExportFolder
from qsvd.files.atomic import read_record, write_json, write_record
from qsvd.files.safetensors import NewTensor, TensorEntry
from qsvd.files.source import PRUNED_BY, Checkpoint, copy_files
from qsvd.plan.weights import ModelPlan
from qsvd.prune.channels import Cut, Mlps, chosen, important


class PruneFolder(ExportFolder):
    """The folder of one run of `qsvd prune`."""

    record = PRUNED_BY
    command = "qsvd prune"


@dataclass(frozen=True)
class Pruned:
    """The result of a run: numbers of channels of each MLP, and of parameters of the model, before and after."""

    channels: int
    kept: int
    parameters: int
    kept_parameters: int


@dataclass(frozen=True)
class Pruning:
    """What is pruned, and how far.

    Args:
        checkpoint: The 16-bit model.
        plan: Of it, with the names of its tensors.
        mlps: Its MLPs.
        kept: Channels to keep in each.
    """

    checkpoint: Checkpoint
    plan: ModelPlan
    mlps: Mlps
    kept: int

    def name(self, cut: Cut) -> str:
        """Return the name of a tensor in the checkpoint."""
        return self.plan.spelling[cut.name]

    def new_tensors(self, kept: Mapping[str, Tensor] | None = None) -> list[NewTensor]:
        """Return the tensors of the pruned model, those of the checkpoint in its order.

        Args:
            kept: Kept channels by block, int64; None if only sizes are asked for.
        """
        cuts = {self.name(cut): (block, cut) for block, found in self.mlps.blocks.items() for cut in found}
        new = []
        for name, entry in self.checkpoint.tensors.items():
            if name not in cuts:
                source = entry if isinstance(entry, TensorEntry) else partial(self.checkpoint.read, name)
                new.append(NewTensor(name, entry.dtype, entry.shape, source))
                continue
            block, cut = cuts[name]
            shape = [*entry.shape]
            shape[cut.axis] = cut.repeats * self.kept
            part = partial(self._part, name, cut, None if kept is None else kept[block])
            new.append(NewTensor(name, entry.dtype, tuple(shape), part))
        return new

    def _part(self, name: str, cut: Cut, kept: Tensor | None) -> Tensor:
        assert kept is not None, "the channels are known when tensors are written"
        return chosen(self.checkpoint.read(name), cut, kept, self.mlps.channels)

    def important(self, block: str) -> list[int]:
        """Return the channels of an MLP to keep; one of its weights at a time is in memory."""
        weights = ((cut, self.checkpoint.read(self.name(cut))) for cut in self.mlps.blocks[block] if cut.is_weight)
        return important(weights, self.mlps.channels, self.kept)


def write_pruned_model(pruning: Pruning, folder: PruneFolder, shard_bytes: int, show: Callable[[int], None]) -> None:
    """Do the work: 1 choose the channels of each MLP, 2 write the shards, 3 write config.json and the records.

    Args:
        show: Is called with the number of MLPs that are looked at.
    """
    out, kept = folder.folder, dict[str, list[int]]()
    for number, block in enumerate(pruning.mlps.blocks):
        path = folder.unfinished / f"{number:05d}.kept"
        if not path.is_file():
            write_record(path, {"kept": pruning.important(block)})
        kept[block] = read_record(path)["kept"]
        show(number + 1)
    new = pruning.new_tensors({block: torch.tensor(channels) for block, channels in kept.items()})
    write_shards(out, shards_of(new, shard_bytes))
    source = pruning.checkpoint
    copy_files(source.other_files, out)
    channels = {block: tuple(found) for block, found in kept.items()}
    mlps = pruning.mlps
    record = PrunedRecord(FORMAT, source.name, source.fingerprint, mlps.option, mlps.channels, channels, mlps.layers())
    write_pruned(out, record)
    write_json(out / "config.json", source.config_json | {mlps.option: pruning.kept})
    before, after = (sum(prod(tensor.shape) for tensor in tensors) for tensors in (source.tensors.values(), new))
    folder.finish(asdict(Pruned(mlps.channels, pruning.kept, before, after)))
