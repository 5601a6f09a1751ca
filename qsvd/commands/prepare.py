"""Everything that can be known, checked and refused before a weight is read."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qsvd.checkpoint.check import check_complete, check_not_quantized
from qsvd.checkpoint.read import Checkpoint, open_checkpoint
from qsvd.checkpoint.tensor_file import TORCH_DTYPES
from qsvd.commands.device import device_of
from qsvd.decompose.alternate import Recipe
from qsvd.numerics.codecs import spelling
from qsvd.numerics.normal_float import NormalFloat4
from qsvd.options import Quantize
from qsvd.plan.allocation import Allocation, from_text
from qsvd.plan.listing import listing
from qsvd.plan.model import ModelPlan, WeightSpec, plan_model
from qsvd.plan.sizes import parse_size

LEAST_SHARD = 10**5  # bytes of one output file


@dataclass(frozen=True)
class Source:
    """A checked request: what is to be split, and how; not yet to how many bits and components.

    Args:
        recipe: Of the loop; codec and rank are those of every weight that no allocation says more about.
        table: The allocation that the options name.
    """

    options: Quantize
    checkpoint: Checkpoint
    plan: ModelPlan
    recipe: Recipe
    table: Allocation | None
    device: torch.device
    compute_dtype: torch.dtype
    shard_bytes: int

    @property
    def out(self) -> Path:
        """The folder of the result."""
        return self.options.out.expanduser()

    @property
    def identity(self) -> dict[str, Any]:
        """What the bytes of the result depend on."""
        options = asdict(self.options)
        for name in ("out", "dry_run", "model", "allocation"):
            del options[name]
        options |= {name: list(options[name]) for name in ("include", "exclude")}
        options["shard_size"] = self.shard_bytes
        if self.table is not None:
            options["allocation"] = {m: [spelling(c.codec), c.rank] for m, c in self.table.choices.items()}
        return options | {"device": self.device.type, "source_fingerprint": self.checkpoint.fingerprint}


def prepare_source(options: Quantize, checkpoint: Checkpoint | None = None) -> Source:
    """Open the checkpoint, name its weights, and refuse what cannot be done.

    Args:
        checkpoint: An open one; None opens options.model.

    Raises:
        ValueError: an option, or the checkpoint, is not usable.
    """
    recipe = Recipe(
        codec=NormalFloat4(double_quant=options.double_quant),
        rank=options.rank,
        iterations=options.iterations,
        order=options.order,
        end=options.end,
        stop=options.stop,
        exact=options.svd == "exact",
        dtype=getattr(torch, options.dtype),
    )
    shard_bytes = parse_size(options.shard_size, "--shard-size", least=LEAST_SHARD)
    device = device_of(options.device)
    checkpoint = checkpoint or open_checkpoint(options.model)
    check_not_quantized(checkpoint.config, checkpoint.tensors)
    plan = plan_model(checkpoint.config, include=options.include, exclude=options.exclude)
    plan = check_complete(checkpoint, plan)
    table = None
    if options.allocation is None:
        _check_rank(options.rank, plan.weights)
    else:
        table = read_allocation(options.allocation, plan.weights)
    compute_dtype = _compute_dtype(checkpoint, plan.weights)
    return Source(options, checkpoint, plan, recipe, table, device, compute_dtype, shard_bytes)


def read_allocation(file: Path, weights: Sequence[WeightSpec]) -> Allocation:
    """The choices of a table that `qsvd allocate` wrote, or somebody edited.

    Raises:
        ValueError: it cannot be read, or does not fit the weights.
    """
    try:
        text = file.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--allocation {file} cannot be read as a text file: {error}") from error
    return from_text(text, weights, f"--allocation {file}")


def _check_rank(rank: int, weights: Sequence[WeightSpec]) -> None:
    small = [f"{spec.module} {list(spec.shape)}" for spec in weights if min(spec.shape) < rank]
    if small:
        limit = min(min(spec.shape) for spec in weights)
        raise ValueError(
            f"--rank {rank} is above the shorter side of {len(small)} weights: {listing(small)}; "
            f"give at most {limit}, or --exclude them"
        )


def _compute_dtype(checkpoint: Checkpoint, weights: Sequence[WeightSpec]) -> torch.dtype:
    """The dtype that most elements are stored in: what a loader decodes to."""
    elements: dict[str, int] = {}
    for spec in weights:
        entry = checkpoint.tensors[spec.name]
        elements[entry.dtype] = elements.get(entry.dtype, 0) + spec.shape[0] * spec.shape[1]
    return TORCH_DTYPES[max(elements, key=lambda name: elements[name])]
