"""Options of `qsvd prune` to a checked run: the 16-bit model, its MLPs, and how many channels are kept."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qsvd.errors import BadInput, listing, parse_size
from qsvd.export.pruned import read_pruned
from qsvd.files.check import check_complete, check_copies, check_finite, check_not_quantized
from qsvd.files.source import PRUNED_RECORD, open_checkpoint
from qsvd.options import Prune
from qsvd.plan.weights import plan_model
from qsvd.prepare.check_options import LEAST_SHARD, check
from qsvd.prune.channels import find_mlps, kept_channels
from qsvd.prune.folder import PruneFolder, Pruning


@dataclass(frozen=True)
class PruneRun:
    """A checked run of `qsvd prune`.

    Args:
        multiple: Of what number the kept channels are a multiple.
        shard_bytes: Maximum size of an output file.
    """

    options: Prune
    pruning: Pruning
    multiple: int
    shard_bytes: int

    @property
    def out(self) -> Path:
        """The folder of the pruned model."""
        return self.options.out.expanduser()

    @property
    def identity(self) -> dict[str, Any]:
        """What the bytes of the pruned model depend on."""
        return {
            "source_fingerprint": self.pruning.checkpoint.fingerprint,
            "kept_channels": self.pruning.kept,
            "shard_bytes": self.shard_bytes,
        }


def prepare_prune(options: Prune) -> PruneRun:
    """Open the model, find its MLPs, and refuse what cannot be pruned.

    Raises:
        BadInput: the model cannot be opened, is quantized or pruned already, has MLPs of another kind, or values that
            are not finite; --keep leaves out nothing; the folder holds something else.
    """
    check(options)
    shard_bytes = parse_size(options.shard_size, "--shard-size", least=LEAST_SHARD)
    checkpoint = open_checkpoint(options.model)
    check_not_quantized(checkpoint.config, checkpoint.tensors)
    if checkpoint.folder is not None and (found := read_pruned(checkpoint.folder)) is not None:
        raise BadInput(
            f"{options.model} is pruned already ({PRUNED_RECORD}): prune {found.original}, which it was made from, "
            "with a lower --keep"
        )
    plan = plan_model(checkpoint.config)
    assert plan.model is not None, "plan_model keeps it"
    mlps = find_mlps(plan.model, checkpoint.config)
    kept, multiple = kept_channels(mlps.channels, options.keep)
    plan = check_complete(checkpoint, plan)
    check_copies(checkpoint, plan)
    names = [cut.name for cuts in mlps.blocks.values() for cut in cuts]
    if absent := [name for name in names if name not in plan.spelling]:
        raise BadInput(
            f"{len(absent)} tensors of MLPs are stored in another form than transformers computes with "
            f"({listing(absent)}): load the model with transformers and save it again"
        )
    run = PruneRun(options, Pruning(checkpoint, plan, mlps, kept), multiple, shard_bytes)
    if not PruneFolder.check(run.out, run.identity):
        check_finite(checkpoint, plan)
    return run
