"""Options of `qsvd quantize` to a checked run: codec and rank of every weight, the output files, the bytes."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qsvd import ranks
from qsvd.calibrate.block_walk import BlockWalk
from qsvd.calibrate.sums import Example
from qsvd.decompose.alternate import Recipe, split_weights, stack_on
from qsvd.decompose.moments import Moments
from qsvd.decompose.objective import PLAIN, Objective
from qsvd.decompose.split import Split, measure_stack
from qsvd.errors import BadInput, DoesNotFit, listing, parse_size
from qsvd.export.peft import misplaced
from qsvd.files.atomic import file_sha256
from qsvd.files.check import check_finite
from qsvd.files.quantize_folder import Shard, Sizes, plan_shards, plan_stacks, sizes_of
from qsvd.files.quantized.compressed import ignored_layers
from qsvd.files.source import Checkpoint
from qsvd.files.statistics import Statistics, statistics_for
from qsvd.files.workspace import MANIFEST, UNFINISHED
from qsvd.memory.device import device_of
from qsvd.numerics.names import spelling
from qsvd.numerics.nf4 import NormalFloat4
from qsvd.option_types import result_options
from qsvd.options import Quantize
from qsvd.options.quantizing import SWEEPS, with_quality
from qsvd.plan.allocation import (
    Allocation,
    Choice,
    Layout,
    Table,
    check_ranks,
    residual_bits,
    tables_of,
    uniform,
    usual_codec,
    with_tables,
)
from qsvd.plan.rules import HEADS
from qsvd.plan.weights import ModelPlan, WeightSpec, coverage
from qsvd.prepare.allocate import (
    AllocateRun,
    allocate_run,
    read_table,
)
from qsvd.prepare.calibrate import tokens_digest
from qsvd.prepare.check_options import check
from qsvd.prepare.machine import seed_of
from qsvd.prepare.models import open_16_bit
from qsvd.prepare.quantizing.calibration import open_walk, streamed, texts_of
from qsvd.records import WeightedError, WeightError
from qsvd.report.header import ReportHeader, codec_words

ALLOCATION = "allocation.txt"  # in OUT, and in its folder of unfinished work


@dataclass(frozen=True)
class QuantizeRun:
    """A checked run of `qsvd quantize`.

    Args:
        statistics: The sensitivity file that the objective needs; None where it needs none.
        shard_bytes: Most bytes of one output file.
        allocation: Codec and rank of every weight; None until `resolve_allocation` has spent the budget.
        table: The text of an allocation table; None where all weights get the same codec and rank.
        tables: The embedding and the head, if they are quantized too.
        examples: The texts of --calibrate.
        cut: A sentence on texts that were cut, or nothing.
    """

    options: Quantize
    checkpoint: Checkpoint
    plan: ModelPlan
    statistics: Statistics | None
    device: torch.device
    shard_bytes: int
    allocation: Allocation | None
    table: str | None
    tables: tuple[Table, ...] = ()
    examples: tuple[Example, ...] = ()
    cut: str = ""

    @property
    def out(self) -> Path:
        """The folder of the quantized model."""
        return self.options.out.expanduser()

    @property
    def resolved(self) -> Allocation:
        """The allocation, which is known by now."""
        assert self.allocation is not None, "resolve_allocation comes before the work"
        return self.allocation

    @property
    def weights(self) -> tuple[WeightSpec, ...]:
        """All that is quantized: the weights of the blocks, then embedding and head."""
        return (*self.plan.weights, *self.tables)

    @cached_property
    def everything(self) -> Allocation:
        """The allocation with embedding and head."""
        return with_tables(self.resolved, self.tables)

    @property
    def quantizer(self) -> Layout:
        """The library with which transformers loads the model; experts need qsvd."""
        return "qsvd" if self.misplaced or any(spec.stack for spec in self.plan.weights) else self.resolved.layout

    @cached_property
    def misplaced(self) -> list[str]:
        """The modules whose components PEFT would put on experts in 16 bits."""
        return misplaced(self.checkpoint.config, [m for m, choice in self.resolved.choices.items() if choice.rank])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the stored components."""
        return getattr(torch, self.options.dtype)

    @cached_property
    def compute_dtype(self) -> torch.dtype:
        """The dtype that a loader decodes to: the one that most elements are stored in."""
        elements = Counter[torch.dtype]()
        for spec in self.plan.weights:
            elements[self.checkpoint.dtype_of(spec)] += math.prod(spec.shape)
        return elements.most_common(1)[0][0]

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the bytes of the output depend on."""
        options = result_options(self.options)
        if self.options.budget is None:
            del options["budget"], options["allocator"]
            if self.statistics is None:
                del options["objective"]
        if self.statistics is not None:
            options["statistics"] = file_sha256(self.statistics.path)
        if self.examples:
            options["tokens_sha256"] = tokens_digest(self.examples)
        options["shard_size"] = self.shard_bytes
        if self.options.allocation is not None:
            choices = self.resolved.choices
            options["allocation"] = {m: [spelling(choice.codec), choice.rank] for m, choice in choices.items()}
        return options | {"device": self.device.type, "source_fingerprint": self.checkpoint.fingerprint}

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        """The output files, in order."""
        dropped = [
            self.plan.spelling[name] for table in self.tables for name in table.others if name in self.plan.spelling
        ]
        return tuple(plan_shards(self.checkpoint, self.weights, self.everything, self.shard_bytes, dropped))

    @cached_property
    def stacks(self) -> list[list[tuple[int, ...]]]:
        """The numbers of the weights that are split together, for each output file; with --calibrate each alone."""
        if self.examples:
            return [[(number,) for number in shard.weights] for shard in self.shards]
        return [plan_stacks(self.checkpoint, self.weights, self.everything, s, self.device.type) for s in self.shards]

    @property
    def largest_stack(self) -> list[WeightSpec]:
        """The stack with the most elements; of several the first one in the model."""
        every = sorted(stack for stacks in self.stacks for stack in stacks)
        largest = max(every, key=lambda stack: len(stack) * math.prod(self.weights[stack[0]].shape))
        return [self.weights[number] for number in largest]

    @cached_property
    def sizes(self) -> Sizes:
        """The bytes that the run reads and writes."""
        return sizes_of(self.checkpoint, self.weights, self.shards, self.everything, self.dtype)

    @cached_property
    def skipped(self) -> tuple[str, ...]:
        """The linear layers that another library must not make 4-bit, if it decodes, and heads that may be added.

        Raises:
            BadInput: transformers' matching would also skip a weight that is split, or convert one that is not.
        """
        from transformers.quantizers.quantizers_utils import should_convert_module

        if self.quantizer == "qsvd":
            return ()
        if self.quantizer == "compressed-tensors":
            return ignored_layers(self.plan, HEADS)
        split = [spec.module for spec in self.plan.weights]
        heads = [head for head in HEADS if all(should_convert_module(path, [head]) for path in split)]
        skipped = list(dict.fromkeys((*self.plan.left_linears, *heads)))
        wrong = [path for path in split if not should_convert_module(path, skipped)]
        if wrong:
            raise BadInput(
                f"transformers cannot tell {listing(wrong)} from the layers that stay in 16 bits, since it compares "
                "the ends of names; exclude these too, or include the others"
            )
        return tuple(skipped)

    @property
    def header(self) -> ReportHeader:
        """The head of the reports."""
        options, choices = self.options, self.everything.choices.values()
        ranks = [choice.rank for choice in self.resolved.choices.values()]
        quantized = replace(self.plan, weights=self.weights)
        return ReportHeader(
            model=options.model,
            codec=codec_words([choice.codec for choice in choices]),
            rank=max(ranks),
            order=options.order,
            iterations=options.iterations or 0,
            end=options.end,
            coverage=coverage(quantized, {name: self.checkpoint.tensors[name].shape for name in self.plan.unknown}),
            least_rank=min(ranks),
            residual_bits=residual_bits(self.everything, self.weights) if self.resolved.layout == "qsvd" else None,
            quantizer=self.quantizer,
            objective="fisher" if options.objective == "fisher" else "plain",
            sensitivity=options.sensitivity or "",
            texts=len(self.examples),
            rounding="feedback" if options.rounding == "feedback" else options.scales or "absmax",
        )

    def recipe(self, module: str) -> Recipe:
        """Return how the weight of a module is split."""
        return _recipe(self.options, self.everything.choices[module])

    def objective(self, module: str) -> Objective:
        """Return what the split of a module's weight minimizes; a BadInput where its statistics are damaged."""
        is_table = module not in self.resolved.choices
        if is_table or self.statistics is None or self.options.objective != "fisher":
            return PLAIN
        return self.statistics.objective(module)

    def split(
        self, specs: Sequence[WeightSpec], weights: Sequence[Tensor], objectives: Sequence[Objective | Moments]
    ) -> tuple[list[Split], list[WeightError]]:
        """Split a stack of weights and measure it; a DoesNotFit or a BadInput says why it cannot."""
        seeds = [seed_of(self.options.seed, spec) for spec in specs]
        names, first = [spec.module for spec in specs], specs[0]
        try:
            weights_SOI = stack_on(self.device, weights)
            splits = split_weights(weights_SOI, self.recipe(names[0]), seeds=seeds, objectives=objectives)
            errors = measure_stack(weights_SOI, splits, names=names, role=first.role, seeds=seeds)
            feeds_back = self.options.rounding == "feedback"
            found = zip(weights_SOI, splits, errors, objectives, strict=True)
            return splits, [_weighted(*one, feeds_back=feeds_back) for one in found]
        except torch.OutOfMemoryError as error:
            raise DoesNotFit(
                f"{first.name} {list(first.shape)} needs about {16 * len(specs) * weights[0].numel() / 1e9:.1f} GB on "
                f"{self.device}; close other programs that use it, or give --device cpu"
            ) from error
        except ValueError as error:
            bad = [spec for spec, one in zip(specs, weights, strict=True) if not torch.isfinite(one).all()] or [first]
            raise BadInput(f"{self.checkpoint.name}: {bad[0].name}: {error}; repair the checkpoint") from error

    def open_walk(self, show: Callable[[str], None]) -> BlockWalk:
        """Return the walk over the blocks that gives the moments of --calibrate; see `open_walk` of calibration.py."""
        model = streamed(self.checkpoint, self.plan, self.device)
        return open_walk(self.options, self.examples, model, show, folder=self.out / UNFINISHED)

    @cached_property
    def measuring(self) -> AllocateRun:
        """The run that spends the budget; its files are in the folder of unfinished work."""
        table = self.out / UNFINISHED / ALLOCATION
        run = allocate_run(self.options, self.checkpoint, self.plan, self.statistics, self.device, table)
        return replace(run, examples=self.examples)


def prepare_quantize(options: Quantize, checkpoint: Checkpoint | None = None, *, is_shown: bool = False) -> QuantizeRun:
    """Open the 16-bit model, name its weights, and refuse what cannot be done.

    Args:
        checkpoint: An open one; None opens options.model.
        is_shown: Whether the run is only shown. The values of the model are not read then, nor where a run goes on.
    """
    check(options, is_open=checkpoint is not None)
    options = with_quality(options)
    is_uniform = options.budget is None and options.allocation is None  # else some weights may have components
    choice = Choice(NormalFloat4(double_quant=options.double_quant), options.rank if is_uniform else 1)
    _recipe(options, choice)  # refuses what cannot be looped
    device, allocation, table = device_of(options.device), None, None
    checkpoint, plan = open_16_bit(options, checkpoint)
    tables = tables_of(plan, options.head_bits, options.embedding_bits)
    codec = usual_codec(plan.weights, double_quant=options.double_quant, packed=bool(tables), name=options.codec)
    choice = replace(choice, codec=codec)
    if options.allocation is not None:
        allocation, table = read_table(options.allocation, plan.weights, tables)
    elif is_uniform:
        allocation = uniform(plan.weights, choice, options.expert_rank)
        check_ranks(allocation, plan.weights)
    examples, cut = texts_of(options, checkpoint, plan)
    run = QuantizeRun(
        options=options,
        checkpoint=checkpoint,
        plan=plan,
        statistics=statistics_for(options.objective, options.statistics, checkpoint, plan.weights),
        device=device,
        shard_bytes=parse_size(options.shard_size, "--shard-size"),
        allocation=allocation,
        table=table,
        tables=tables,
        examples=examples,
        cut=cut,
    )
    # refuses a budget that cannot be met, or names that transformers cannot tell apart
    _ = run.measuring if allocation is None else run.skipped
    is_begun = (run.out / UNFINISHED).exists() or (run.out / MANIFEST).exists()
    if ranks.is_main() and not (is_shown or options.dry_run or is_begun):
        check_finite(checkpoint, plan)
    return run


def _weighted(
    weight_OI: Tensor, split: Split, error: WeightError, objective: Objective | Moments, *, feeds_back: bool
) -> WeightError:
    """Add the relative errors in the norm of second moments, if they weighted the split."""
    if not isinstance(objective, Moments):
        return error
    weight_OI, objective = weight_OI.float(), objective.to(weight_OI.device)
    alone_OI = split.residual.codec.encode(weight_OI).decode().neg_().add_(weight_OI)
    nothing = weight_OI.new_zeros(1, len(weight_OI), 0), weight_OI.new_zeros(1, 0, weight_OI.shape[1])
    before, whole = (float(objective.squares(part[None], *nothing)) ** 0.5 for part in (alone_OI, weight_OI))
    after = split.history[split.iteration - 1]  # in this norm
    ratios = [part / whole if whole else 0.0 for part in (before, after)]
    return replace(error, weighted=WeightedError(*ratios, kept_nearest=feeds_back and split.iteration == 1))


def _recipe(options: Quantize, choice: Choice) -> Recipe:
    assert options.iterations is not None, "with_quality was called"
    assert options.scales is not None, "with_quality was called"
    assert options.rounding is not None, "with_quality was called"
    loop = (options.iterations, options.order, options.end, options.stop, options.svd == "exact")
    dtype = getattr(torch, options.dtype)
    sweeps = SWEEPS[options.quality or "fast"]
    how = {"scales": options.scales, "rounding": options.rounding, "sweeps": sweeps}
    return Recipe(choice.codec, choice.rank, *loop, dtype, **how)
