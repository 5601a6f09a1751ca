"""The options of the commands that make a quantized model."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from qsvd.option_types import (
    ADDED,
    PRINTS,
    SAME_RESULT,
    SECONDS,
    SHARE_ABOVE_ZERO,
    AddedAs,
    Allocation,
    Allocator,
    ComputeDtype,
    Data,
    DataSplit,
    Device,
    DoubleQuant,
    EmbeddingBits,
    Exclude,
    ExpertRank,
    Format,
    Group,
    HeadBits,
    Help,
    Include,
    IncludeTowers,
    LossOn,
    Map,
    MaxLength,
    Model,
    Objective,
    Public,
    PushToHub,
    Seed,
    ShardSize,
    Statistics,
    Step,
    StoredDtype,
    at_least,
)

NEAREST_PASSES, FEEDBACK_PASSES, BEST_PASSES = 5, 2, 4  # iterations by default
SWEEPS = {"fast": 1, "good": 1, "best": 2}  # of coordinate descent after each feedback

Calibration = Annotated[
    str | None,
    SAME_RESULT,
    Group("calibration"),
    Help("Texts that errors are weighted by: what qsvd train reads, or a text file.", "DATA"),
]


@dataclass(frozen=True)
class Allocate:
    """Choose bits and rank of each layer: the least error within a budget.

    The output is a text file for qsvd quantize --allocation; you can edit it. Measured errors are kept in
    FILE.costs.jsonl: a stopped run continues from there, and another budget or allocator takes seconds.
    """

    model: Annotated[Model, SAME_RESULT]
    budget: Annotated[str, SAME_RESULT, Help("Size of weights and components: 2.75bits per weight, or 20GB.", "SIZE")]
    out: Annotated[Path, SAME_RESULT, Help("Output file. An edited file is never overwritten.", "FILE")]

    allocator: Annotated[Allocator, SAME_RESULT, Group("method")] = "both"
    objective: Annotated[Objective, SAME_RESULT] = "relative"
    statistics: Annotated[Statistics, SAME_RESULT] = None
    rank: Annotated[int, SAME_RESULT, Help("Rank of every layer, for --allocator bits.")] = 64
    codecs: Annotated[
        tuple[str, ...], Help("Formats to try, e.g. nf3-64-8x256. Default: seven of them.", "NAME ...")
    ] = ()
    ranks: Annotated[tuple[int, ...], Help("Ranks to try, e.g. 0 16 64. Default: 0 and powers of two.", "N ...")] = ()
    count: Annotated[
        Literal["stored", "training"], SAME_RESULT, Help("What the budget limits: file size, or memory in training.")
    ] = "stored"
    gap: Annotated[float, SAME_RESULT, at_least(0), Help("Relative optimality gap at which the solver stops.")] = 1e-4
    time_limit: Annotated[float, SAME_RESULT, SECONDS, Help("Time limit of the solver in seconds.")] = 60.0

    calibrate: Calibration = None
    sensitivity: Annotated[
        Literal["inputs", "both"] | None,
        ADDED,
        Help("What errors are weighted by: inputs of layers, or gradients too. Default: both."),
    ] = None
    examples: Annotated[int, ADDED, at_least(1), Help("Number of texts, drawn by --seed.")] = 128
    max_length: Annotated[MaxLength, ADDED] = None
    map: Annotated[Map, SAME_RESULT] = ()
    split: Annotated[DataSplit, SAME_RESULT] = "train"

    include: Annotated[Include, SAME_RESULT, Group("layer")] = ()
    exclude: Annotated[Exclude, SAME_RESULT] = ()
    include_towers: Annotated[IncludeTowers, SAME_RESULT] = False

    dtype: Annotated[StoredDtype, Group("run")] = "bfloat16"
    device: Device = "auto"
    seed: Seed = 0


@dataclass(frozen=True)
class Calibrate:
    """Estimate how sensitive the loss is to each weight.

    Measures Fisher information and, with --traces, Hessian traces. A language model takes texts, chats or completions,
    a classifier takes labelled texts. One block is in memory at a time.
    """

    model: Annotated[Model, SAME_RESULT]
    data: Annotated[Data, SAME_RESULT]
    out: Annotated[Path, SAME_RESULT, Help("Output file. The same command continues a stopped run.", "FILE")]

    examples: Annotated[int, Group("data"), at_least(1), Help("Number of examples, drawn by --seed.")] = 128
    max_length: MaxLength = None
    traces: Annotated[int, at_least(0), Help("Random probes per example for Hessian traces; 0: no traces.")] = 0
    gradient_rank: Annotated[
        int | None, ADDED, at_least(1), Help("Also keep gradients for qsvd train --method lora-ga, up to this --rank.")
    ] = None
    loss_on: LossOn = "answers"
    map: Annotated[Map, SAME_RESULT] = ()
    split: Annotated[DataSplit, SAME_RESULT] = "train"

    include: Annotated[Include, Group("layer")] = ()
    exclude: Annotated[Exclude, Help("Layers to leave out.", "GLOB ...")] = ()
    include_towers: Annotated[
        IncludeTowers, ADDED, Help("Also measure the encoder of images, on examples with images.")
    ] = False

    dtype: Annotated[ComputeDtype, Group("run")] = "auto"
    chunk: Annotated[
        int | None,
        SAME_RESULT,
        at_least(1),
        Help("Examples processed together. Affects memory only. Default: what fits."),
    ] = None
    device: Device = "auto"
    seed: Annotated[Seed, Help("Random seed (choice of examples, probes).")] = 0


@dataclass(frozen=True)
class Quantize:
    """Quantize a 16-bit model and keep the largest singular components in 16 bits.

    Every layer gets 4 bits and --rank components; with --budget, each layer gets its own bits and rank.
    """

    model: Annotated[Model, SAME_RESULT]
    out: Annotated[Path, SAME_RESULT, Help("Output folder. The same command continues a stopped run.", "OUT")]

    rank: Annotated[int, Group("method"), at_least(0), Help("Components per layer; 0 is plain NF4 (QLoRA).")] = 64
    expert_rank: Annotated[ExpertRank, ADDED] = None
    quality: Annotated[
        Literal["fast", "good", "best"] | None,
        AddedAs("fast"),
        Help("fast: as in the papers; good: error feedback; best: with --calibrate. Default: fast, with data best."),
    ] = None
    iterations: Annotated[
        int | None, at_least(1), Help("Maximum iterations; the best one is kept. Default: fast 5, good 2, best 4.")
    ] = None
    order: Annotated[Step, Help("First step: svd (QPiSSA, LQ-LoRA) or quantize (LoftQ).")] = "svd"
    end: Annotated[Step, Help("Last step of each iteration; quantize is QPiSSA as published.")] = "svd"
    stop: Annotated[Literal["rise", "never"], Help("rise: stop when the error rises; never: all iterations.")] = "rise"
    scales: Annotated[
        Literal["absmax", "mse"] | None,
        AddedAs("absmax"),
        Help("Largest magnitudes (absmax) or scales of least error (mse). Default: by --quality."),
    ] = None
    rounding: Annotated[
        Literal["nearest", "feedback"] | None,
        AddedAs("nearest"),
        Help("feedback: errors go where components remove them. Default: by --quality."),
    ] = None
    svd: Annotated[Literal["randomized", "exact"], Help("exact is slow above a few thousand rows.")] = "randomized"
    dtype: StoredDtype = "bfloat16"
    codec: Format = "nf4"
    double_quant: DoubleQuant = True
    head_bits: HeadBits = None
    embedding_bits: EmbeddingBits = None

    calibrate: Calibration = None
    sensitivity: Annotated[
        Literal["inputs", "both"] | None,
        ADDED,
        Help(
            "What errors are weighted by: inputs of layers, or gradients too. Default: both, with quality good inputs."
        ),
    ] = None
    examples: Annotated[int, ADDED, at_least(1), Help("Number of texts, drawn by --seed.")] = 128
    max_length: Annotated[MaxLength, ADDED] = None
    map: Annotated[Map, SAME_RESULT] = ()
    split: Annotated[DataSplit, SAME_RESULT] = "train"

    budget: Annotated[
        str | None,
        Group("mixed-precision"),
        Help("Size of weights and components: 2.75bits per weight, or 20GB.", "SIZE"),
    ] = None
    allocator: Allocator = "both"
    objective: Objective = "relative"
    statistics: Annotated[Statistics, SAME_RESULT] = None
    allocation: Annotated[Allocation, SAME_RESULT] = None

    include: Annotated[Include, Group("layer")] = ()
    exclude: Exclude = ()
    include_towers: Annotated[IncludeTowers, ADDED] = False

    shard_size: Annotated[ShardSize, Group("run")] = "5GB"
    device: Device = "auto"
    seed: Annotated[Seed, Help("Random seed (SVD sketches, choice of texts, labels).")] = 0
    push_to_hub: Annotated[PushToHub, SAME_RESULT] = None
    public: Annotated[Public, SAME_RESULT] = False
    dry_run: Annotated[bool, SAME_RESULT, PRINTS, Help("Print options, layers and sizes, and stop.")] = False


@dataclass(frozen=True)
class Prune:
    """Remove the least important channels of the MLPs of a 16-bit model, to train a LoRA on it for the whole model.

    The importance of a channel is the product of the norms of its gate row, its up row and its down column. After
    training, qsvd export --to lora --original MODEL writes the LoRA for the model that was pruned.
    """

    model: Annotated[Model, SAME_RESULT]
    out: Annotated[Path, SAME_RESULT, Help("Output folder. The same command continues a stopped run.", "PRUNED")]
    keep: Annotated[
        float, SHARE_ABOVE_ZERO, Help("Share of the channels to keep, rounded to a multiple of up to 64 channels.")
    ] = 0.5
    shard_size: ShardSize = "5GB"


def with_quality(options: Quantize) -> Quantize:
    """Return the options with what --quality leaves open: iterations, scales, rounding and sensitivity."""
    has_data = options.calibrate is not None
    quality = options.quality or ("best" if has_data else "fast")
    rounding = options.rounding or ("nearest" if quality == "fast" else "feedback")
    feeds_back = rounding == "feedback"
    passes = (BEST_PASSES if quality == "best" else FEEDBACK_PASSES) if feeds_back else NEAREST_PASSES
    return replace(
        options,
        quality=quality,
        rounding=rounding,
        scales=options.scales or ("mse" if feeds_back or has_data else "absmax"),
        iterations=options.iterations or passes,
        sensitivity=options.sensitivity or (None if not has_data else "both" if quality == "best" else "inputs"),
    )
