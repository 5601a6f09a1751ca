"""Everything that can be known, checked and refused before a weight is read."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qsvd.checkpoint.check import check_complete, check_not_quantized
from qsvd.checkpoint.read import Checkpoint, open_checkpoint
from qsvd.checkpoint.statistics import Statistics, check_statistics, open_statistics
from qsvd.checkpoint.tensor_file import TORCH_DTYPES
from qsvd.checkpoint.whole_file import file_sha256
from qsvd.decompose.alternate import Recipe
from qsvd.decompose.objective import PLAIN, Objective
from qsvd.numerics.codecs import spelling
from qsvd.numerics.normal_float import NormalFloat4
from qsvd.options import Quantize
from qsvd.plan.allocation import Allocation, from_text
from qsvd.plan.device import device_of
from qsvd.plan.listing import listing
from qsvd.plan.model import ModelPlan, WeightSpec, plan_model
from qsvd.plan.sizes import parse_size

LEAST_SHARD = 10**5  # bytes of one output file


@dataclass(frozen=True)
class Table:
    """An allocation, and the text that says it."""

    allocation: Allocation
    text: str


@dataclass(frozen=True)
class Source:
    """A checked request: what is to be split, and how; with a budget not yet to how many bits and components.

    Args:
        recipe: Of the loop; codec and rank are those of every weight where there is neither table nor budget.
        table: That the options name.
        statistics: Where the objective asks for them.
        shard_bytes: Most of one output file.
    """

    options: Quantize
    checkpoint: Checkpoint
    plan: ModelPlan
    recipe: Recipe
    table: Table | None
    statistics: Statistics | None
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
        for name in ("out", "dry_run", "model", "allocation", "statistics"):
            del options[name]
        if self.options.budget is None:
            del options["budget"], options["allocator"]
            if self.statistics is None:
                del options["objective"]
        if self.statistics is not None:
            options["statistics"] = file_sha256(self.statistics.path)
        options |= {name: list(options[name]) for name in ("include", "exclude")}
        options["shard_size"] = self.shard_bytes
        if self.table is not None:
            choices = self.table.allocation.choices
            options["allocation"] = {m: [spelling(choice.codec), choice.rank] for m, choice in choices.items()}
        return options | {"device": self.device.type, "source_fingerprint": self.checkpoint.fingerprint}

    def objective(self, module: str) -> Objective:
        """What the split of a weight is to minimise; a ValueError where its statistics are damaged."""
        if self.statistics is None or self.options.objective != "fisher":
            return PLAIN
        return self.statistics.objective(module)


def prepare_source(options: Quantize, checkpoint: Checkpoint | None = None) -> Source:
    """Open the checkpoint, name its weights, and refuse what cannot be done.

    Args:
        checkpoint: An open one; None opens options.model.

    Raises:
        ValueError: an option, or the checkpoint, is not usable.
    """
    recipe = Recipe(
        codec=NormalFloat4(double_quant=options.double_quant),
        rank=options.rank if options.budget is None and options.allocation is None else 1,  # of any that has factors
        iterations=options.iterations,
        order=options.order,
        end=options.end,
        stop=options.stop,
        exact=options.svd == "exact",
        dtype=getattr(torch, options.dtype),
    )
    _check_choices(options)
    shard_bytes = parse_size(options.shard_size, "--shard-size", least=LEAST_SHARD)
    device = device_of(options.device)
    checkpoint = checkpoint or open_checkpoint(options.model)
    check_not_quantized(checkpoint.config, checkpoint.tensors)
    plan = plan_model(checkpoint.config, include=options.include, exclude=options.exclude)
    plan = check_complete(checkpoint, plan)
    if options.allocation is None and options.budget is None:
        _check_rank(options.rank, plan.weights)
    return Source(
        options=options,
        checkpoint=checkpoint,
        plan=plan,
        recipe=recipe,
        table=None if options.allocation is None else read_table(options.allocation, plan.weights),
        statistics=statistics_for(options.objective, options.statistics, checkpoint, plan.weights),
        device=device,
        compute_dtype=_compute_dtype(checkpoint, plan.weights),
        shard_bytes=shard_bytes,
    )


def read_table(file: Path, weights: Sequence[WeightSpec]) -> Table:
    """The choices of a table that `qsvd allocate` wrote, or somebody edited.

    Raises:
        ValueError: it cannot be read, or does not fit the weights.
    """
    try:
        text = file.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--allocation {file} cannot be read as a text file: {error}") from error
    return Table(from_text(text, weights, f"--allocation {file}"), text)


def _check_choices(options: Quantize) -> None:
    """Refuse options that say different things about bits and ranks."""
    if options.allocation is not None and options.budget is not None:
        raise ValueError("--budget and --allocation: one of them says how many bits a weight gets; leave one out")
    if options.budget is not None and options.dry_run:
        raise ValueError(
            "--dry-run cannot show what a budget leads to before the weights are measured; qsvd allocate measures "
            "them, and qsvd plan --budget says the bytes"
        )
    if options.allocator != "both" and options.budget is None:
        raise ValueError(f"--allocator {options.allocator} spends a --budget, and none is given; add one")
    if options.objective == "hessian" and options.budget is None:
        raise ValueError("--objective hessian weights whole matrices, so it matters with --budget only; add one")


def statistics_for(
    objective: str, file: Path | None, checkpoint: Checkpoint, weights: Sequence[WeightSpec]
) -> Statistics | None:
    """The statistics that an objective needs.

    Raises:
        ValueError: they are not given, or not needed, or those of another model, or without traces for the Hessian.
    """
    if objective in ("relative", "frobenius"):
        if file is not None:
            raise ValueError(
                f"--statistics are for --objective fisher or hessian, and it is {objective}; give one of them"
            )
        return None
    if file is None:
        raise ValueError(
            f"--objective {objective} needs --statistics FILE, which qsvd calibrate makes; or leave --objective out"
        )
    path = file.expanduser()
    statistics = open_statistics(path)
    modules = [spec.module for spec in weights]
    check_statistics(statistics, checkpoint.fingerprint, modules, path)
    wrong = []
    for module in modules:
        try:
            _ = statistics.objective(module) if objective == "fisher" else statistics.trace(module)
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        raise ValueError(f"{len(wrong)} of {len(modules)} weights have no usable statistics: {listing(wrong, 2)}")
    return statistics


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
